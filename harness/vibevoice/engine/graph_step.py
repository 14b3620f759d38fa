"""A frame step of many sessions on a GPU as one CUDA graph; the sessions' state never leaves the device.

A session is a slot: two rows of every table, one that its next step reads and one that it writes. A step copies one
small block of inputs to the device, launches one graph, and copies one block of results back; the next step may be
launched before those have arrived. Prompts of many sessions are read together as rows, by separate graphs.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from harness import wire
from harness.errors import RequestError, ServerError
from harness.vibevoice.engine.frame_step import Frames, Opening, PromptPart, Row
from harness.vibevoice.kernels import cuda_graphs, ragged
from harness.vibevoice.process.setup import DEVICE_ERRORS
from harness.vibevoice.sessions.table import NoRoom
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.towers import TableTower, Tower

PROMPT_ROWS = (32, 128, 256)  # tokens of a prompt graph
PROMPT_PARTS = (2, 8)  # contexts of up to 1,024 and 4,096 positions; above, flash attention reads a cache only once
_MOST = 2 * cuda_graphs.BATCHES[-1]  # rows of a step
_PROMPT_FACTS = 4  # per token: its id or -1, then its cache
_FACTS, _NUMBERS = (
    10,
    wire.LATENT_SIZE + 1,
)  # per row: read, write, token id, forced token, two caches; noise, guidance
_ANSWERS = (wire.SAMPLES_PER_FRAME, wire.LATENT_SIZE, wire.SEMANTIC_SIZE, 1)  # audio, latent, semantic, token
_MODEL_SAYS = -1


def table_bytes(weights: Weights, sessions: int) -> int:
    """Bytes of the tables of this many sessions on the device."""
    shapes = copy.copy(weights)
    shapes.device, shapes.checkpoint = torch.device("meta"), None
    towers = Tower(shapes.acoustic_decoder()), Tower(shapes.semantic_encoder())
    values = sum(tower.state_size for tower in towers)
    return (2 * sessions + 2) * (values * weights.dtype.itemsize + 4 * (wire.LATENT_SIZE + wire.SEMANTIC_SIZE))


@dataclass
class _Slot:
    number: int
    writes_second: bool = True

    @property
    def rows(self) -> tuple[int, int]:
        """The row that the next step reads, and the one that it writes."""
        first, second = 2 * self.number, 2 * self.number + 1
        return (first, second) if self.writes_second else (second, first)

    def turn(self) -> None:
        self.writes_second = not self.writes_second


@dataclass
class _Launched:
    """A launched step: its results are in ``host`` once it has ended."""

    host: torch.Tensor
    began: torch.cuda.Event | None
    ended: torch.cuda.Event | None
    order: list[int]  # row of the results for each requested row
    tokens: list[int] = field(default_factory=list)
    ready: bool = False
    took_ns: int = 0

    def values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        answers = self.answers()
        audio, latent, semantic, _ = np.split(answers, np.cumsum(_ANSWERS)[:-1], axis=1)
        return audio, latent, semantic

    def answers(self) -> np.ndarray:
        """All results, copied before the step after the next overwrites them."""
        if self.ended is not None:
            self.ended.synchronize()
            self.took_ns = _between_ns(self.began, self.ended)
        return self.host.numpy()[self.order]


class GraphStep:
    """See ``frame_step.FrameStep``. ``sessions``: number of slots. On a CPU no graphs are recorded."""

    odd_groups = 1  # each runs separately and without a graph
    prompt_tokens = PROMPT_ROWS[-1]

    def __init__(self, weights: Weights, kv_limit_bytes: int, sessions: int):
        without_graphs = copy.copy(weights)
        without_graphs.graph_batch = 0  # the stages record no graphs of their own
        self.llm, self.diffusion = LLMStage(without_graphs, kv_limit_bytes), DiffusionStage(without_graphs)
        self.llm.sessions.idle_limit_s = float("inf")  # the engine closes its sessions itself
        self.device, self.dtype = weights.device, weights.dtype
        self.kv_limit_bytes, self.kv_bytes_per_token = kv_limit_bytes, self.llm.kv_bytes_per_token
        decoder, encoder = Tower(weights.acoustic_decoder()), Tower(weights.semantic_encoder())
        tower = _tower_kind(weights)
        self.decoder, self.encoder = tower(decoder), tower(encoder, decoder.state_size)
        self.scale, self.bias = weights.latent_scale_and_bias()
        self._tables(sessions, decoder.state_size + encoder.state_size)
        self._slots: dict[int, _Slot] = {}
        self.prompt_ns, self.token_ns = 0, 0.0
        self._reading: deque = deque()  # events before and after each read, and its number of tokens
        self._free = list(range(sessions))[::-1]
        self._asked = _Inputs(2 * _MOST, _MOST, ((_FACTS, torch.int64), (_NUMBERS, torch.float32)), self.device)
        prompt = (_PROMPT_FACTS, torch.int64), (wire.LATENT_SIZE, torch.float32)
        self._prompt = _Inputs(PROMPT_ROWS[-1], PROMPT_ROWS[-1], prompt, self.device)
        pinned = self.device.type == "cuda"
        self._answers = [torch.zeros(2 * _MOST, sum(_ANSWERS), pin_memory=pinned) for _ in range(2)]
        self.graphs = _Recordings([batch for batch in cuda_graphs.BATCHES if batch <= weights.graph_batch])
        if weights.graph_batch:
            self._record()

    def _tables(self, sessions: int, state_size: int) -> None:
        """Two rows for each slot, then one dummy row to read and one dummy row to write."""
        rows = 2 * sessions + 2
        self.nobodys, self.empty = rows - 2, rows - 1
        self.states = torch.zeros(rows, state_size, dtype=self.dtype, device=self.device)
        self.latents = torch.zeros(rows, wire.LATENT_SIZE, device=self.device)
        self.semantics = torch.zeros(rows, wire.SEMANTIC_SIZE, device=self.device)
        (_, _, _, facts) = self.llm.graph_inputs()
        self._nobodys_cache = facts.filler.tolist()

    def open(self, session: int, opening: Opening) -> None:
        if not self._free:
            raise NoRoom(f"{wire.BUSY}all {len(self._slots)} slots of this engine are taken")
        if opening.state is not None and len(opening.state) != self.states.shape[1]:
            raise RequestError(
                f"a convolution state has {len(opening.state)} values where this model holds {self.states.shape[1]}"
            )
        self.llm.open(session, opening.prompt_tokens, opening.frames, opening.start_frame, opening.forced, opening.say)
        slot = self._slots[session] = _Slot(self._free.pop())
        tables = (self.states, opening.state), (self.latents, opening.latent), (self.semantics, opening.semantic)
        try:
            for table, values in tables:
                row = table[slot.rows[0]]
                row.zero_() if values is None else row.copy_(torch.from_numpy(np.array(values)))
        except Exception:
            self.close(session)
            raise

    def close(self, session: int, keep: bool = False) -> np.ndarray:
        self.llm.close(session)
        slot = self._slots.pop(session, None)
        if slot is None:
            return np.empty(0, np.float32)
        self._free.append(slot.number)  # safe: the device finishes its queued work before that of a new session
        return self.states[slot.rows[0]].float().cpu().numpy() if keep else np.empty(0, np.float32)

    def is_broken_by(self, error: Exception) -> bool:
        return isinstance(error, DEVICE_ERRORS)

    def check(self, session: int) -> None:
        self.llm.check_step(session)

    def replay(self, session: int, tokens: np.ndarray, latent: np.ndarray, semantic: np.ndarray) -> None:
        self._note_read()
        began = _event(self.device)
        given = torch.from_numpy(latent).to(self.device), torch.from_numpy(semantic).to(self.device)
        self.llm.replay(session, tokens.tolist(), *given)
        self._reading.append((began, _event(self.device), 0))

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row]) -> Frames:
        """Launch one step of these sessions; sessions with the same number of denoising steps form one batch."""
        self._answers.reverse()
        sessions = [self.llm.sessions.get(row.session) for row in rows]
        says = [self.llm.told(session) for session in sessions]
        self._note_read()
        facts, numbers = self._asked.begin()
        began = None
        order, start = [0] * len(rows), 0
        for steps in sorted({row.steps for row in rows}):
            group = [i for i, row in enumerate(rows) if row.steps == steps]
            for place, i in enumerate(group, start):
                order[i] = place
                facts[place] = self._facts(rows[i].session, sessions[i], says[i])
                numbers[place, :-1], numbers[place, -1] = rows[i].noise, rows[i].guidance
            lengths = [length for i in group for length in sessions[i].lengths]
            began = began or _event(self.device)
            start = self._batch(facts, start, len(group), ragged.parts_of(lengths), steps)
        launched = _Launched(self._answers[0], began, _event(self.device), order)
        launched.ready = None in says  # if the model chooses a token, the next step's input depends on it
        launched.tokens = [int(token) for token in launched.answers()[:, -1]] if launched.ready else says
        self.llm.advance(sessions, launched.tokens)
        for row, token in zip(rows, launched.tokens, strict=True):
            if token == wire.TOKEN_SPEECH_FRAME:
                self._slots[row.session].turn()
        return launched

    def _facts(self, number: int, session, says: int | None) -> list[int]:
        """A step's inputs for one session."""
        pending = -1 if session.pending_token is None else session.pending_token
        branches = session.with_prompt, session.without_prompt
        with_prompt, without = ragged.facts_of([each.kv for each in branches], session.lengths)
        return [*self._slots[number].rows, pending, _MODEL_SAYS if says is None else says, *with_prompt, *without]

    def _batch(self, facts: np.ndarray, start: int, count: int, parts: int, steps: int) -> int:
        """Launch one batch with inputs and results from row ``start`` on; returns where the next batch may begin."""
        graph = self.graphs.step(count, parts) if steps == wire.DEFAULT_DIFFUSION_STEPS else None
        filled = graph.rows if graph else count
        facts[start + count : start + filled] = self._filler()
        given = self._asked.send(start, filled)
        if graph:
            graph.recorded.graph.replay()
            (answers,) = graph.recorded.outputs
        else:
            answers = self.compute(*given, parts, steps)
        self._answers[0][start : start + count].copy_(answers[:count], non_blocking=True)
        return start + filled

    def _filler(self) -> list[int]:
        return [self.empty, self.nobodys, -1, wire.TOKEN_SPEECH_FRAME, *self._nobodys_cache, *self._nobodys_cache]

    def compute(self, facts: torch.Tensor, numbers: torch.Tensor, parts: int, steps: int) -> torch.Tensor:
        """A step on the device alone: facts [N, 10] and numbers [N, 65] of each session -> answers [N, 3393]."""
        read, write, ids, says = facts[:, :4].t().contiguous().unbind()
        caches = facts[:, 4:].reshape(-1, 2, 3)
        latent, semantic = self.latents.index_select(0, read), self.semantics.index_select(0, read)
        condition, likely = self.llm.compute(latent, semantic, ids, caches, parts)
        token = torch.where(says < 0, likely, says)
        both = condition.to(self.dtype).transpose(0, 1).reshape(2 * len(read), -1)
        noise, guidance = numbers.split((wire.LATENT_SIZE, 1), 1)
        latent = self.diffusion.compute(both, noise, guidance, steps)
        write = torch.where(token == wire.TOKEN_SPEECH_FRAME, write, self.nobodys)
        audio, semantic = self._vocode(latent, read, write)
        self.latents.index_copy_(0, write, latent)
        self.semantics.index_copy_(0, write, semantic)
        return torch.cat((audio, latent, semantic, token[:, None].float()), 1)

    def _vocode(
        self, latent: torch.Tensor, read: torch.Tensor, write: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latent [N, 64] -> audio [N, 3200] and semantic features [N, 128], in float32."""
        scaled = (latent / self.scale - self.bias).to(self.dtype)[:, None]
        audio = self.decoder(scaled, self.states, read, write)
        semantic = self.encoder(audio, self.states, read, write)
        return audio[..., 0].float(), semantic[:, 0].float()

    @torch.inference_mode()
    def read(self, parts: Sequence[PromptPart]) -> None:
        """Read parts of prompts: those with short contexts in one launch, the others one by one."""
        self._note_read()
        began = _event(self.device)
        is_short = [self._reach(part) <= PROMPT_PARTS[-1] for part in parts]
        if any(is_short):
            self._read_rows([part for part, short in zip(parts, is_short, strict=True) if short])
        for part, short in zip(parts, is_short, strict=True):
            if not short:
                ids = torch.tensor(part.token_ids, dtype=torch.int32)
                self.llm.prefill(part.session, ids, torch.from_numpy(part.voice_frames))
        self._reading.append((began, _event(self.device), sum(len(part.token_ids) for part in parts)))

    def _note_read(self) -> None:
        """Add the times of the reads that the device has completed."""
        while self._reading and (self._reading[0][1] is None or self._reading[0][1].query()):
            began, ended, tokens = self._reading.popleft()
            took_ns = _between_ns(began, ended)
            self.prompt_ns += took_ns
            self.token_ns = took_ns / tokens if tokens else self.token_ns

    def _reach(self, part: PromptPart) -> int:
        """Number of parts into which the attention of the part's last token splits its context."""
        branch = self.llm.sessions.get(part.session).with_prompt
        return ragged.parts_of([branch.length + len(part.token_ids) - 1])

    def _read_rows(self, parts: Sequence[PromptPart]) -> None:
        facts, voices = self._prompt.begin()
        at, reach = 0, max(map(self._reach, parts))
        for part in parts:
            end = at + len(part.token_ids)
            ids = np.array(part.token_ids)
            spoken = ids == self.llm.config.audio_token_id
            branch = self.llm.takes(part.session, torch.from_numpy(ids), int(spoken.sum()), len(part.voice_frames))
            ((*cache, length),) = ragged.facts_of([branch.kv], [branch.length])
            facts[at:end, 0], facts[at:end, 1:3] = np.where(spoken, -1, ids), cache
            facts[at:end, 3] = np.arange(length, length + len(ids))
            voices[at:end][spoken] = part.voice_frames
            self.llm.has_read(part.session, len(ids))
            at = end
        graph = self.graphs.prompt(at, reach)
        rows = graph.rows if graph else at
        facts[at:rows] = [0, *self._nobodys_cache]
        given = self._prompt.send(0, rows)
        if graph:
            graph.recorded.graph.replay()
        else:
            self.compute_prompt(*given, reach)

    def compute_prompt(self, facts: torch.Tensor, voices: torch.Tensor, parts: int) -> torch.Tensor:
        """Read tokens on the device: facts [rows, 4] (id or -1, cache, its capacity, position), voices [rows, 64]."""
        ids, caches = facts[:, 0], facts[:, 1:].contiguous()
        spoken = self.llm.acoustic(voices.to(self.dtype))
        embeds = torch.where((ids >= 0)[:, None], self.llm.backbone.embed_tokens(ids.clamp(0)), spoken)
        return self.llm.backbone(embeds, caches[:, 2], ragged.RaggedRows(caches, parts))

    def _record(self) -> None:
        """Record a graph for every batch and reach, the largest first: the others reuse its memory."""
        memory, largest = cuda_graphs.Memory.of(self.device), self.graphs.batches[-1]
        self._asked.begin()[0][:] = self._filler()
        self._prompt.begin()[0][:] = [0, *self._nobodys_cache]
        asked, prompt = self._asked.send(0, largest), self._prompt.send(0, PROMPT_ROWS[-1])
        steps, positions = wire.DEFAULT_DIFFUSION_STEPS, self.llm.config.text_config.max_position_embeddings
        for rows in reversed(self.graphs.batches):
            given = [each[:rows] for each in asked]
            for parts in reversed(ragged.recorded_parts(positions)):
                step = lambda given=given, parts=parts: (self.compute(*given, parts, steps),)  # noqa: E731
                self.graphs.steps.append(
                    _Graph(rows, parts, self._recorded(step, f"a step of {rows} sessions", memory))
                )
        for rows in reversed(PROMPT_ROWS):
            given = [each[:rows] for each in prompt]
            for parts in reversed(PROMPT_PARTS):
                read = lambda given=given, parts=parts: (self.compute_prompt(*given, parts),)  # noqa: E731
                self.graphs.prompts.append(_Graph(rows, parts, self._recorded(read, f"{rows} tokens", memory)))
        memory.free()

    def _recorded(self, step: Callable, what: str, memory: cuda_graphs.Memory) -> cuda_graphs.Recorded:
        try:
            return cuda_graphs.record(step, memory)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise ServerError(
                f"{self.device} cannot record {what} as a CUDA graph: {error}; set the parameter `graphs` of "
                f"{wire.ENGINE} to a smaller batch, or to 0 for none"
            ) from error


@dataclass(frozen=True)
class _Graph:
    """A recorded graph, and the largest numbers of rows and of context parts that it supports."""

    rows: int
    parts: int
    recorded: cuda_graphs.Recorded


@dataclass
class _Recordings:
    """The graphs of steps and of prompts."""

    batches: list[int]
    steps: list[_Graph] = field(default_factory=list)
    prompts: list[_Graph] = field(default_factory=list)

    def step(self, rows: int, parts: int) -> _Graph | None:
        return _smallest(self.steps, rows, parts)

    def prompt(self, rows: int, parts: int) -> _Graph | None:
        return _smallest(self.prompts, rows, parts)


def _smallest(recorded: Sequence[_Graph], rows: int, parts: int) -> _Graph | None:
    fitting = [each for each in recorded if each.rows >= rows and each.parts >= parts]
    return min(fitting, key=lambda each: (each.rows, each.parts), default=None)


class _Inputs:
    """Rows that a step reads at fixed device addresses; on the host two buffers are written alternately."""

    def __init__(
        self, host_rows: int, device_rows: int, widths: Sequence[tuple[int, torch.dtype]], device: torch.device
    ):
        pinned, self.device = device.type == "cuda", device
        self.read = [torch.zeros(device_rows, width, dtype=dtype, device=device) for width, dtype in widths]
        self._hosts = [
            [torch.zeros(host_rows, width, dtype=dtype, pin_memory=pinned) for width, dtype in widths] for _ in range(2)
        ]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def begin(self) -> list[np.ndarray]:
        """The rows on the host, once the device has read what was last sent from there."""
        self._turn ^= 1
        if sent := self._sent[self._turn]:
            sent.synchronize()
        return [each.numpy() for each in self._hosts[self._turn]]

    def send(self, start: int, count: int) -> list[torch.Tensor]:
        """Copy ``count`` rows from ``start`` on to the first rows on the device; returns those."""
        for host, read in zip(self._hosts[self._turn], self.read, strict=True):
            read[:count].copy_(host[start : start + count], non_blocking=True)
        self._sent[self._turn] = _event(self.device)
        return [read[:count] for read in self.read]


def _tower_kind(weights: Weights) -> type:
    """The class of a tower: custom kernels on a GPU."""
    if weights.device.type != "cuda" or weights.plain:
        return TableTower
    from harness.vibevoice.stages.fused_towers import FusedTower  # needs a GPU to compile

    return FusedTower


def _between_ns(began: torch.cuda.Event | None, ended: torch.cuda.Event | None) -> int:
    return 0 if began is None else round(1e6 * began.elapsed_time(ended))


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event that completes with all work queued on the device so far; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
