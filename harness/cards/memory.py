"""What a server takes of a card's memory: weights, processes, graphs, tables; and the sessions that fit in the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness import gpu_memory, wire
from harness.capacity.models.memory import PROMPT_TOKENS_PER_FRAME, KvRoom
from harness.cards.card import Card
from harness.cards.costs import ModelCosts

SESSIONS = 512  # that a server on a GPU admits: GPU_SESSIONS in deploy/config.py
LENGTHS_S = (10, 600, 5400)  # of sessions for which a table says how many fit
_PROCESSES = {wire.STAGED: gpu_memory.STAGED_PROCESSES, wire.FUSED: gpu_memory.FUSED_PROCESSES}


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Bytes of a card. ``reserve_bytes``: left free for fragmentation; ``process_bytes``: CUDA contexts, kernels,
    activations, workspace and graphs of all processes; ``table_bytes``: states of a fused engine's slots.

    ``room_bytes``: the rest, for KV caches; below 0 where the model does not fit.
    """

    total_bytes: int
    reserve_bytes: int
    weight_bytes: int
    processes: int
    process_bytes: int
    table_bytes: int
    kv_bytes_per_token: int
    most_frames: int

    @property
    def free_bytes(self) -> int:
        """What is left for KV caches; negative where the model does not fit."""
        taken = self.reserve_bytes + self.weight_bytes + self.process_bytes + self.table_bytes
        return self.total_bytes - taken

    @property
    def room_bytes(self) -> int:
        return max(0, self.free_bytes)

    @property
    def kv(self) -> KvRoom:
        return KvRoom(float(self.room_bytes), self.kv_bytes_per_token)

    def sessions_of(self, seconds: float) -> int:
        """Sessions of this many seconds that fit at once, by their bytes at the end; 0 beyond ``most_frames``."""
        if seconds * wire.FRAMES_PER_SECOND > self.most_frames:
            return 0
        return min(SESSIONS, int(self.room_bytes // self._bytes_of(seconds * wire.FRAMES_PER_SECOND)))

    @property
    def longest_s(self) -> float:
        """Seconds of the longest session that fits alone, at most those that the model speaks; 0 if none fits."""
        frames = np.arange(1, self.most_frames + 1)
        fitting = np.flatnonzero(self.kv.bytes_of(frames) <= self.room_bytes)
        return float(frames[fitting[-1]] * wire.SECONDS_PER_FRAME) if len(fitting) else 0.0

    def _bytes_of(self, frames: float) -> int:
        return int(self.kv.bytes_of(np.array([frames]))[0])


def budget_of(card: Card, costs: ModelCosts, topology: str, processes_factor: float = 1.0) -> MemoryBudget:
    """The budget of a server with one instance of everything. ``processes_factor``: times the usual bytes of processes.

    The same sums as ``gpu_memory.gpu_room``, by which a server sets its limit.
    """
    processes = _PROCESSES[topology]
    taken = processes_factor * gpu_memory.taken_by_processes(processes, max(costs.graph_batches))
    return MemoryBudget(
        total_bytes=card.memory_bytes,
        reserve_bytes=round((1 - gpu_memory.GPU_SHARE) * card.memory_bytes),
        weight_bytes=costs.weight_bytes,
        processes=processes,
        process_bytes=round(taken),
        table_bytes=_table_bytes(costs) if topology == wire.FUSED else 0,
        kv_bytes_per_token=costs.kv_bytes_per_token,
        most_frames=min(wire.MAX_FRAMES, int(costs.most_positions / (1 + PROMPT_TOKENS_PER_FRAME))),
    )


def _table_bytes(costs: ModelCosts) -> int:
    """Bytes of the fused engine's tables: two rows for each slot and two more, as ``graph_step.table_bytes``."""
    row = costs.state_values * costs.itemsize + 4 * (wire.LATENT_SIZE + wire.SEMANTIC_SIZE)
    return (2 * SESSIONS + 2) * row
