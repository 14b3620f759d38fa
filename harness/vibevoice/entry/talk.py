"""One session of the entry at the stages: opened, prefilled part by part, spoken frame by frame, kept, closed.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait

import numpy as np
import triton_python_backend_utils as pb

from harness import wire
from harness.clock import HOST, Clock
from harness.vibevoice import backend
from harness.vibevoice.entry import stage_calls
from harness.vibevoice.entry.prompt import SpeechRequest, prompt_chunks
from harness.vibevoice.sessions.admission import Busy
from harness.vibevoice.sessions.carry import Past
from harness.vibevoice.sessions.failures import ClientLeft
from harness.vibevoice.sessions.turns import Turns

MOST_TRIES = 256  # attempts to open a session per instance: half the slots in config.pbtxt
CARRY_PIECE = 1 << 20  # bytes
_FRAME_OUTPUTS = [wire.AUDIO, wire.LATENT, wire.SEMANTIC, wire.TOKEN]


class Channel:
    """The response stream of one request, with a heartbeat every ``beat_s`` seconds."""

    def __init__(self, sender, emulated: bool, beat_s: float, started: Callable[[float], None], clock: Clock = HOST):
        """``started`` is told the seconds of ``clock`` from now, when the request has come, until its first audio."""
        self._sender, self._beat_s = sender, beat_s
        self._started, self._clock, self.frames = started, clock, 0  # sent so far
        self._first = {wire.BEAT_S: np.array([beat_s], np.float32)}  # sent once, with the first response
        if emulated:
            self._first[wire.EMULATED] = np.array([True])
        self._began_ns, self._sent_s = time.monotonic_ns(), time.monotonic()

    def check(self) -> None:
        """Raise ClientLeft if the client has disconnected."""
        if self._sender.is_cancelled():
            raise ClientLeft

    def audio(self, samples: np.ndarray) -> None:
        """Send a chunk [samples] of whole frames."""
        if not self.frames:
            self._started(self._clock.of_host(time.monotonic_ns() - self._began_ns) / 1e9)
        tensors = {
            wire.AUDIO_OUTPUT: samples,
            wire.FRAME_INDEX: np.array([self.frames], np.int32),
            wire.SENT_AT_NS: np.array([time.monotonic_ns()], np.int64),
        }
        self.frames += len(samples) // wire.SAMPLES_PER_FRAME
        self._send(**tensors)

    def carry(self, data: bytes) -> None:
        """Send a carry in pieces: that of 90 minutes is twice what a process shares with the server at its start."""
        whole = np.frombuffer(data, np.uint8)
        for start in range(0, len(whole), CARRY_PIECE):
            self._send(**{wire.CARRY: whole[start : start + CARRY_PIECE]})

    def description(self, identities: list[dict]) -> None:
        self._send(**{wire.DESCRIPTION: np.array([json.dumps(identities).encode()], np.object_)})

    def beat(self) -> None:
        """Send an empty response after a silence, so that the client can tell waiting from a dead server."""
        if time.monotonic() - self._sent_s >= 0.8 * self._beat_s:  # called five times per interval
            self._send()

    def fail(self, error: Exception) -> None:
        """Send an error; only ``end`` may follow."""
        self._sender.send(backend.failure(error))

    def end(self) -> None:
        self._sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send(self, **tensors: np.ndarray) -> None:
        self._sent_s = time.monotonic()
        first, self._first = self._first, {}
        self._sender.send(backend.response(**tensors, **first))


class Talk:
    """A session at the stages, from ``open`` to ``close``; ``number`` is its id there, taken from ``numbers``."""

    def __init__(self, numbers: Iterator[int], request: SpeechRequest, channel: Channel):
        self.numbers, self.request, self.channel = numbers, request, channel
        self.number = 0
        self.tokens: list[int] = []  # generated in this request
        self.fed: list[tuple[np.ndarray, np.ndarray]] = []  # latent and semantic features of its frames, if it is kept
        self._at_vocoder = False

    async def open(self) -> None:
        """Open the session at an instance of the LLM stage. Raises Busy where none has room now.

        Triton chooses the instance. The slot at an instance that refused stays taken while the next is tried, or Triton
        would choose that instance again.
        """
        tried, full = [], set()
        try:
            while True:
                self.number = next(self.numbers)
                tried.append(self.number)
                try:
                    await self._start()
                    tried.pop()
                    return
                except Busy as error:
                    full.add(error.place)
                    if len(full) >= error.places or len(tried) >= MOST_TRIES * error.places:
                        raise
        finally:
            await asyncio.gather(*map(stage_calls.close_llm, tried), return_exceptions=True)

    async def _start(self) -> None:
        request = self.request
        most = request.steps_behind + request.frames
        shape = [len(request.prompt.token_ids), most, request.start_frame, request.forced]
        inputs = {wire.SESSION: np.array([shape], np.int32)}
        if request.say:
            inputs[wire.SAY] = np.array([request.say], np.int32)
        await stage_calls.tell_llm(self.number, inputs, backend.START)

    async def prefill(self, voices: list[np.ndarray], part_tokens: int, audio_token_id: int, turns: Turns) -> None:
        """Send prompt and past part by part; each part takes one of ``turns``, which all sessions share.

        The vocoder session is opened last: while long prompts are queued, Triton might drop it as idle.
        """
        await self._add(self._parts(voices, part_tokens, audio_token_id), turns)
        self._at_vocoder = True
        await stage_calls.open_vocoder(self.number, self.request.past.state if self.request.past else None)

    def _parts(self, voices: list[np.ndarray], size: int, audio_token_id: int) -> Iterator[dict[str, np.ndarray]]:
        """The LLM stage's input before the first step, call by call."""
        frames = np.concatenate(voices) if voices else np.empty((0, wire.LATENT_SIZE), np.float32)
        for part, places in prompt_chunks(self.request.to_read, size, audio_token_id):
            yield {wire.TOKEN_IDS: np.array([part], np.int32), wire.VOICE_FRAMES: frames[places].reshape(1, -1)}
        for part in self.request.past_parts(size):
            names = wire.PAST_TOKEN, wire.PAST_LATENT, wire.PAST_SEMANTIC
            yield {name: values.reshape(1, -1) for name, values in zip(names, part, strict=True)}

    async def _add(self, parts: Iterator[dict[str, np.ndarray]], turns: Turns) -> None:
        read = 0
        for inputs in parts:
            async with turns.one(read):
                self.channel.check()
                await stage_calls.tell_llm(self.number, inputs)
            read += next(iter(inputs.values())).shape[1]

    async def speak(self, pool: Executor) -> None:
        """Speak until all frames are spoken, or the model generates "end of text"."""
        await asyncio.to_thread(self._speak, pool)

    def _speak(self, pool: Executor) -> None:
        """The frame loop, in its own thread.

        While a frame is computed, a thread of the pool sends the previous one: both wait for the server.
        """
        ready, told = [], pool.submit(self._tell, [])
        try:
            for audio in self._steps():
                ready += [] if audio is None else [audio]
                told.result()
                full = len(ready) == self.request.chunk_frames
                told = pool.submit(self._tell, ready if full else [])
                ready = [] if full else ready
        finally:
            wait([told])  # nothing may follow the final response
        told.result()
        self._tell(ready)

    def _steps(self) -> Iterator[np.ndarray | None]:
        """The audio [3200] of each step; None where the model generated another token."""
        request, spoken = self.request, 0
        fixed = {
            wire.GUIDANCE: np.array([[request.guidance_scale]], np.float32),
            wire.STEPS: np.array([[request.diffusion_steps]], np.int32),
        }
        rows = _noise_rows(request)
        latent, semantic, noise = *_last_of(request.past), next(rows)
        while spoken < request.frames:
            inputs = {wire.PREVIOUS_LATENT: latent, wire.PREVIOUS_SEMANTIC: semantic, wire.NOISE: noise, **fixed}
            audio, latent, semantic, token = stage_calls.call_here(wire.FRAME, inputs, _FRAME_OUTPUTS, self.number)
            self.tokens.append(int(token[0, 0]))
            if self.tokens[-1] == wire.TOKEN_END_OF_TEXT:
                return
            if self.tokens[-1] != wire.TOKEN_SPEECH_FRAME:
                yield None
                continue
            noise = next(rows)
            spoken += 1
            if request.keep:
                self.fed.append((latent[0].copy(), semantic[0].copy()))
            yield audio[0].copy()  # a copy: the arrays are in memory shared with the server, which is scarce

    def _tell(self, ready: list[np.ndarray]) -> None:
        """Send the frames that are ready as one chunk, and check that the client is still connected."""
        if ready:
            self.channel.audio(ready[0] if len(ready) == 1 else np.concatenate(ready))
        self.channel.check()

    async def keep(self, model: str, script: str, key: str) -> None:
        """Send the client its session for resuming it later, and end it.

        ``model`` and ``script`` are the fingerprints stored with it; ``key`` authenticates it.
        """
        self._at_vocoder = False
        state = (await stage_calls.close_vocoder(self.number)).copy()
        # In a thread: an hour of speech takes a tenth of a second, while others speak.
        past = lambda: past_of(self.request, self.tokens, self.fed, model, script, state)  # noqa: E731
        self.channel.carry(await asyncio.to_thread(lambda: past().encode(key)))

    async def close(self) -> None:
        """Close the session at every stage that may have it."""
        closing = [stage_calls.close_llm(self.number)]
        if self._at_vocoder:
            closing.append(stage_calls.close_vocoder(self.number))
        # A stage without the session answers with an error, which needs no handling.
        await asyncio.gather(*closing, return_exceptions=True)


def past_of(
    request: SpeechRequest,
    said: Sequence[int],
    fed: Sequence[tuple[np.ndarray, np.ndarray]],
    model: str,
    script: str,
    state: np.ndarray,
) -> Past:
    """The state of a session to be kept: ``said`` in this request, ``fed`` the latent and semantic of its frames."""
    latents = [latent for latent, _ in fed]
    semantics = [semantic for _, semantic in fed]
    tokens = np.array(said, np.int32)
    left = np.array(request.say[len(said) :], np.int32)
    before = request.past
    if before:
        latents, semantics = [*before.latents, *latents], [*before.semantics, *semantics]
        tokens = np.concatenate([before.tokens, tokens])
    stacked = (
        np.array(rows, np.float32).reshape(-1, size)
        for rows, size in ((latents, wire.LATENT_SIZE), (semantics, wire.SEMANTIC_SIZE))
    )
    return Past(model, script, request.seed, request.start_frame, tokens, *stacked, left, state)


def _noise_rows(request: SpeechRequest):
    """A row of noise [1, 64] for each remaining speech frame."""
    noise = np.random.default_rng(request.seed)
    if request.past:
        noise.standard_normal((request.past.frames, wire.LATENT_SIZE), np.float32)
    while True:
        yield noise.standard_normal((1, wire.LATENT_SIZE), np.float32)


def _last_of(past: Past | None) -> tuple[np.ndarray, np.ndarray]:
    """Latent [1, 64] and semantic features [1, 128] of the last frame before this request's first."""
    if past is None or not past.frames:
        return stage_calls.NO_LATENT, stage_calls.NO_SEMANTIC
    return past.latents[-1:], past.semantics[-1:]
