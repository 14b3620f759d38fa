"""Stages that take the times of a profile instead of computing; their audio is silent.

They replace the real ones, method for method, without torch or weights, for example an H200's on a laptop. Sessions and
admission by bytes of KV cache work as in the real LLM stage.

A call of a process that has the GPU to itself takes host_ms + device_ms, which is the profile's ms. Host time comes
first, in which the process launches its kernels; it blocks no other process, so host times overlap. Then the call
occupies the GPU for device_ms; these turns never overlap. n processes that call without a pause each make one
call in max(host_ms + device_ms, n x device_ms). A real GPU starts with the first kernels while the host still launches
others, and is idle between them; one turn after the host time ends at the same moment, with the same idle time.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import wire
from harness.clock import HOST, Clock
from harness.errors import RequestError
from harness.vibevoice.profiling.times import ProfiledTimes, Times
from harness.vibevoice.sessions.table import SPARE_STEPS, Sessions, check_numbers, check_room, room_used_up

_SPIN_NS = 100_000  # a sleep may end this late; the rest of the time is spent spinning


class EmulatedGPU:
    """One GPU shared by the processes of several stages: they take turns, in the order of their requests.

    ``clock``: slower than the host's under time dilation. Its file holds when it is free again (CLOCK_MONOTONIC, ns). A
    call advances that by its own time under the file's lock and then waits for it, so turns follow each other without a
    gap however late a process wakes.
    """

    def __init__(self, file: Path, clock: Clock = HOST):
        self.clock = clock
        self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._file, 0)  # an earlier server may have left contents

    def spend(self, milliseconds: float, host_ms: float = 0.0) -> None:
        """Let the host time pass, then occupy the GPU for ``milliseconds`` of its clock; returns at the end."""
        milliseconds, host_ms = self.clock.host_span(milliseconds), self.clock.host_span(host_ms)
        ready_ns = time.monotonic_ns() + round(host_ms * 1e6)
        if host_ms:
            wait_until(ready_ns)
        wait_until(self._reserve(round(milliseconds * 1e6), ready_ns))

    def seconds(self) -> float:
        """The time of its clock, in seconds."""
        return self.clock.now_ns() / 1e9

    def _reserve(self, duration_ns: int, ready_ns: int | None = None) -> int:
        """Reserve the next turn for work ready at a given time (default now); returns the turn's end, in ns."""
        ready_ns = time.monotonic_ns() if ready_ns is None else ready_ns
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            stored = os.pread(self._file, 8, 0)
            free_ns = struct.unpack("<q", stored)[0] if stored else 0
            end_ns = max(free_ns, ready_ns) + duration_ns
            os.pwrite(self._file, struct.pack("<q", end_ns), 0)
            return end_ns
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def wait_until(deadline_ns: int) -> None:
    """Sleep until a time of CLOCK_MONOTONIC; on an idle machine at most some 10 µs late, never early."""
    while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
        if left_ns > _SPIN_NS:
            time.sleep((left_ns - _SPIN_NS) / 1e9)


def _call(stage, time_of: Callable[[Times], float]) -> None:
    """A call of an emulated stage; ``time_of`` returns its time from the profile."""
    host_ms, device_ms = stage.profile.parts_ms(time_of)
    stage.gpu.spend(device_ms, host_ms)


@dataclass
class _EmulatedSession:
    rooms: tuple[int, int]  # capacity in positions of the branches with and without the prompt
    lengths: list[int]  # filled positions of both
    say: deque[int]

    @property
    def context(self) -> int:
        return sum(self.lengths)


class EmulatedLLM:
    """``LLMStage`` without tensors: sessions, their room in bytes of KV cache, and their tokens.

    A session whose tokens are not forced generates frames: there is no model to choose.
    """

    def __init__(self, profile: ProfiledTimes, gpu: EmulatedGPU, kv_limit_bytes: int):
        self.profile, self.gpu = profile, gpu
        self.hidden_size = profile.sizes.hidden_size
        self.kv_bytes_per_token = profile.sizes.kv_bytes_per_token
        self.kv_limit_bytes = kv_limit_bytes
        self.sessions: Sessions[_EmulatedSession] = Sessions(wire.LLM, gpu.seconds)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the open sessions would hold."""
        return sum(sum(session.rooms) for session in self.sessions.states()) * self.kv_bytes_per_token

    @property
    def kv_used_bytes(self) -> int:
        """Bytes of them that would be filled."""
        return sum(session.context for session in self.sessions.states()) * self.kv_bytes_per_token

    def open(
        self,
        session_id: int,
        prompt_tokens: int,
        frames: int,
        start_frame: int = 0,
        forced: bool = True,
        say: Sequence[int] = (),
    ) -> None:
        """Open a session as ``LLMStage.open`` does."""
        check_numbers(prompt_tokens, frames, start_frame)
        spare = 0 if forced else SPARE_STEPS
        rooms = prompt_tokens + 1 + frames + len(say) + spare, 1 + frames
        self.sessions.drop_idle()
        check_room(sum(rooms), self.kv_bytes_per_token, self.kv_bytes, self.kv_limit_bytes)
        filled = [prompt_tokens + start_frame, start_frame] if start_frame else [0, 0]
        self.sessions.open(session_id, _EmulatedSession(rooms, filled, deque(say)))

    def close(self, session_id: int) -> None:
        self.sessions.close(session_id)

    def prefill(self, session_id: int, token_ids: Sequence[int], voice_frames: object = None) -> None:
        """Add token_ids [T] to the prompt."""
        self._extend(self.sessions.get(session_id), 0, len(token_ids))

    def replay(self, session_id: int, tokens: Sequence[int], latent: object = None, semantic: object = None) -> None:
        """Take steps whose results are known."""
        session = self.sessions.get(session_id)
        self._extend(session, 0, len(tokens))
        reset = max((i for i, token in enumerate(tokens) if token == wire.TOKEN_SPEECH_BEGIN), default=-1)
        if reset >= 0:
            session.lengths[1] = 0
        if frames := list(tokens[reset + 1 :]).count(wire.TOKEN_SPEECH_FRAME):
            self._extend(session, 1, frames)

    def step(self, session_ids: Sequence[int], latent: object = None, semantic: object = None):
        """One frame for each session -> condition [N, 2, hidden] (zeros), token [N] (wire.TOKEN_*)."""
        sessions = [self.sessions.get(session_id) for session_id in session_ids]
        for branch, session in itertools.product((0, 1), sessions):
            self._check_room(session, branch)
        contexts = [session.context for session in sessions]
        _call(self, lambda times: times.step_ms(contexts))
        tokens = [_say(session) for session in sessions]
        return np.zeros((len(tokens), 2, self.hidden_size), np.float32), np.array(tokens, np.int32)

    def _extend(self, session: _EmulatedSession, branch: int, positions: int) -> None:
        self._check_room(session, branch, positions)
        _call(self, lambda times: times.prefill_ms(positions, session.lengths[branch]))
        session.lengths[branch] += positions

    def _check_room(self, session: _EmulatedSession, branch: int, positions: int = 1) -> None:
        if session.lengths[branch] + positions > session.rooms[branch]:
            raise room_used_up(session.rooms[branch])


def _say(session: _EmulatedSession) -> int:
    """The next token of a session; only a frame advances the branch without the prompt, "speech begin" clears it."""
    token = session.say.popleft() if session.say else wire.TOKEN_SPEECH_FRAME
    session.lengths[0] += 1
    if token == wire.TOKEN_SPEECH_FRAME:
        session.lengths[1] += 1
    elif token == wire.TOKEN_SPEECH_BEGIN:
        session.lengths[1] = 0
    return token


class EmulatedDiffusion:
    """``DiffusionStage`` without tensors."""

    def __init__(self, profile: ProfiledTimes, gpu: EmulatedGPU):
        self.profile, self.gpu = profile, gpu

    def denoise(self, condition: object, noise: object, guidance: object, steps: Sequence[int]) -> np.ndarray:
        """A number of steps per row -> latent [N, 64], zeros."""
        _call(self, lambda times: times.denoise_ms(steps))
        return np.zeros((len(steps), wire.LATENT_SIZE), np.float32)


class EmulatedVocoder:
    """``VocoderStage`` without tensors; a convolution state is zeros of the real size."""

    def __init__(self, profile: ProfiledTimes, gpu: EmulatedGPU):
        self.profile, self.gpu = profile, gpu
        self.state_size = profile.sizes.state_values
        self.sessions: Sessions[bool] = Sessions(wire.VOCODER, gpu.seconds)

    def open(self, session_id: int, state: Sequence[float] | None = None) -> None:
        """Start a session. Raises RequestError for a state of another size."""
        if state is not None and len(state) != self.state_size:
            raise RequestError(f"a convolution state has {len(state)} values where this model holds {self.state_size}")
        self.sessions.open(session_id, True)

    def close(self, session_id: int) -> np.ndarray:
        """End a session -> its state [state_size], empty for an unknown session."""
        return np.zeros(self.state_size if self.sessions.close(session_id) else 0, np.float32)

    def step(self, session_ids: Sequence[int], latent: object, token: object) -> tuple[np.ndarray, np.ndarray]:
        """token [N] -> audio [N, 3200] and semantic [N, 128], zeros; only speech frames take time."""
        frames = [i for i, said in enumerate(token.tolist()) if said == wire.TOKEN_SPEECH_FRAME]
        for i in frames:
            self.sessions.get(session_ids[i])
        if frames:
            _call(self, lambda times: times.vocode_ms(len(frames)))
        sizes = wire.SAMPLES_PER_FRAME, wire.SEMANTIC_SIZE
        return tuple(np.zeros((len(session_ids), size), np.float32) for size in sizes)


class EmulatedVoice:
    """``VoiceStage`` without tensors."""

    def __init__(self, profile: ProfiledTimes, gpu: EmulatedGPU):
        self.profile, self.gpu = profile, gpu

    def encode(self, waveform: Sequence[float]) -> np.ndarray:
        """waveform [samples] -> acoustic frames [ceil(samples / 3200), 64], zeros."""
        _call(self, lambda times: times.encode_ms(len(waveform) / wire.SAMPLE_RATE_HZ))
        return np.zeros((math.ceil(len(waveform) / wire.SAMPLES_PER_FRAME), wire.LATENT_SIZE), np.float32)
