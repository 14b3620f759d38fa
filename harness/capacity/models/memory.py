"""KV cache memory as a number of sessions: bytes per session, and how many fit on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from harness.errors import InputError
from harness.records.fit import FittedKv
from harness.topology import Knobs, instances_of, kv_holder

KV_BYTES_PER_TOKEN = {"tiny": 512, "1.5b": 28_672, "7b": 57_344}  # tiny in float32, the others in bfloat16
CONVOLUTION_STATE_BYTES = 700_000
PROMPT_TOKENS_PER_FRAME = 240 / 450  # scripts: about 240 tokens for a minute of speech, which is 450 frames


def prompt_tokens(frames: np.ndarray | float, voice_frames: int = 0) -> np.ndarray:
    """Prompt tokens of a session of ``frames`` frames: its script, and the voice samples of its speakers."""
    return np.ceil(np.asarray(frames) * PROMPT_TOKENS_PER_FRAME) + voice_frames


def session_bytes(
    prompt_tokens: int | np.ndarray,
    frames: int | np.ndarray,
    kv_bytes_per_token: int,
    *,
    state_bytes: int = CONVOLUTION_STATE_BYTES,
) -> int | np.ndarray:
    """Bytes of a session at its end: one KV entry per token of prompt + frames, and one more per frame.

    The second branch (classifier-free guidance) sees the frames without the prompt, so it holds the frames only.
    Tokens and frames are numbers or arrays [n]. Raises InputError for negative values.
    """
    if min(np.min(prompt_tokens), np.min(frames), kv_bytes_per_token, state_bytes) < 0:
        raise InputError("tokens, frames and bytes of a session must be 0 or more")
    return (prompt_tokens + 2 * frames) * kv_bytes_per_token + state_bytes


@dataclass(frozen=True)
class KvRoom:
    """Room for the KV caches of a device's sessions; a session is admitted when its final size is free.

    ``limit_bytes``: of each of the LLM's ``instances``, which are on ``gpus`` GPUs. ``voice_frames``: of the voice
    samples in a prompt.
    """

    limit_bytes: float
    bytes_per_token: int
    instances: int = 1
    voice_frames: int = 150
    gpus: int = 1

    @classmethod
    def of_record(cls, record: FittedKv) -> KvRoom:
        return cls(record.limit_bytes, record.bytes_per_token, record.instances, record.voice_frames, record.gpus)

    def of(self, deployment: Knobs) -> KvRoom:
        """This with the instances of a deployment; as it is where no knob says how many."""
        own = instances_of(deployment, kv_holder(deployment), self.gpus, default=0)
        return replace(self, instances=own) if own else self

    def record(self) -> FittedKv:
        return FittedKv(
            limit_bytes=self.limit_bytes,
            bytes_per_token=self.bytes_per_token,
            instances=self.instances,
            voice_frames=self.voice_frames,
            gpus=self.gpus,
        )

    @property
    def room_bytes(self) -> float:
        """Bytes of all instances together. That a session may find its own instance full is not modelled."""
        return self.limit_bytes * self.instances

    def bytes_of(self, frames: np.ndarray) -> np.ndarray:
        """Bytes of sessions of ``frames`` frames [n], with a prompt for as many."""
        tokens = prompt_tokens(frames, self.voice_frames)
        return np.asarray(session_bytes(tokens, frames, self.bytes_per_token, state_bytes=0)).astype(np.int64)

    def slots(self, frames_in_progress: np.ndarray) -> float:
        """Sessions that fit, if their total lengths are those of sessions found in progress, in frames [n]."""
        return self.room_bytes / float(np.mean(self.bytes_of(frames_in_progress)))
