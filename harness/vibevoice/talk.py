"""One session of the entry: opened at the stages, prefilled part by part, spoken frame by frame, kept, closed.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import triton_python_backend_utils as pb

from harness import wire
from harness.vibevoice import backend, calls
from harness.vibevoice.admission import Busy
from harness.vibevoice.carry import Past
from harness.vibevoice.prompt import SpeechRequest, prompt_chunks

MOST_TRIES = 256  # of opening a session, for each instance: as many places as Triton gives it in config.pbtxt
BEAT_S = 5.0  # a request hears from its server at least so often
_FRAME_OUTPUTS = [wire.AUDIO, wire.LATENT, wire.SEMANTIC, wire.TOKEN]


class ClientLeft(Exception):
    """The client cancelled its stream."""


class Channel:
    """The response stream of one request."""

    def __init__(self, sender, emulated: bool):
        self._sender = sender
        self._first = {wire.EMULATED: np.array([True])} if emulated else {}  # told once, with the first audio
        self._sent_s = time.monotonic()

    def check(self) -> None:
        """Raise ClientLeft if the client is no longer there."""
        if self._sender.is_cancelled():
            raise ClientLeft

    def audio(self, samples: np.ndarray, frame_index: int) -> None:
        """Send a chunk [samples] whose first frame is the ``frame_index``-th of this stream."""
        tensors = {
            wire.AUDIO_OUTPUT: samples,
            wire.FRAME_INDEX: np.array([frame_index], np.int32),
            wire.SENT_AT_NS: np.array([time.monotonic_ns()], np.int64),
        }
        self._send(**tensors, **self._first)
        self._first = {}

    def carry(self, data: bytes) -> None:
        self._send(**{wire.CARRY: np.frombuffer(data, np.uint8)})

    def beat(self) -> None:
        """An empty response after a time of silence, so that the client can tell waiting from a server that died."""
        if time.monotonic() - self._sent_s >= BEAT_S:
            self._send()

    def end(self, error: Exception | None = None) -> None:
        final = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if error is None:
            self._sender.send(flags=final)
        else:
            self._sender.send(backend.failure(error), flags=final)

    def _send(self, **tensors: np.ndarray) -> None:
        self._sent_s = time.monotonic()
        self._sender.send(backend.response(**tensors))


class Talk:
    """A session at the stages, from ``open`` to ``close``; ``number`` is its id there, one of ``numbers``."""

    def __init__(self, numbers: Iterator[int], request: SpeechRequest, channel: Channel):
        self.numbers, self.request, self.channel = numbers, request, channel
        self.number = 0
        self.tokens: list[int] = []  # said in this request
        self.fed: list[tuple[np.ndarray, np.ndarray]] = []  # latent and semantic of its frames, if it is to be kept
        self._at_vocoder = False

    async def open(self) -> None:
        """Take room at an instance of the LLM stage. Raises Busy where none has room now.

        Triton chooses the instance. One that refused keeps a place taken while the next is tried, or it would be
        chosen again.
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
            await asyncio.gather(*map(calls.close_llm, tried), return_exceptions=True)

    async def _start(self) -> None:
        request = self.request
        most = request.steps_behind + request.frames
        shape = [len(request.prompt.token_ids), most, request.start_frame, request.forced]
        inputs = {wire.SESSION: np.array([shape], np.int32)}
        if request.say:
            inputs[wire.SAY] = np.array([request.say], np.int32)
        await calls.tell_llm(self.number, inputs, backend.START)

    async def prefill(self, voices: list[np.ndarray], part_tokens: int, audio_token_id: int, turns) -> None:
        """Send prompt and past part by part; each takes one of ``turns``, a semaphore that all sessions share.

        The vocoder is told last: long prompts in line would leave its session idle until Triton gives it up.
        """
        await self._add(self._parts(voices, part_tokens, audio_token_id), turns)
        self._at_vocoder = True
        await calls.open_vocoder(self.number, self.request.past.state if self.request.past else None)

    def _parts(self, voices: list[np.ndarray], size: int, audio_token_id: int) -> Iterator[dict[str, np.ndarray]]:
        """What the LLM stage is to hold before the first step, as inputs of one call after another."""
        frames = np.concatenate(voices) if voices else np.empty((0, wire.LATENT_SIZE), np.float32)
        for part, places in prompt_chunks(self.request.prompt.token_ids, size, audio_token_id):
            yield {wire.TOKEN_IDS: np.array([part], np.int32), wire.VOICE_FRAMES: frames[places].reshape(1, -1)}
        for part in self.request.past.parts(size) if self.request.past else ():
            names = wire.PAST_TOKEN, wire.PAST_LATENT, wire.PAST_SEMANTIC
            yield {name: values.reshape(1, -1) for name, values in zip(names, part, strict=True)}

    async def _add(self, parts: Iterator[dict[str, np.ndarray]], turns: asyncio.Semaphore) -> None:
        for inputs in parts:
            async with turns:
                self.channel.check()
                await calls.tell_llm(self.number, inputs)

    async def speak(self) -> None:
        """The frame loop: until all frames are spoken, or the model says "end of text"."""
        request, ready, spoken = self.request, [], 0
        fixed = {
            wire.GUIDANCE: np.array([[request.guidance_scale]], np.float32),
            wire.STEPS: np.array([[request.diffusion_steps]], np.int32),
        }
        rows = _noise_rows(request)
        latent, semantic, noise = *_last_of(request.past), next(rows)
        while spoken < request.frames:
            self.channel.check()
            inputs = {wire.PREVIOUS_LATENT: latent, wire.PREVIOUS_SEMANTIC: semantic, wire.NOISE: noise, **fixed}
            audio, latent, semantic, token = await calls.call(wire.FRAME, inputs, _FRAME_OUTPUTS, self.number)
            self.tokens.append(int(token[0, 0]))
            if self.tokens[-1] == wire.TOKEN_END_OF_TEXT:
                break
            if self.tokens[-1] != wire.TOKEN_SPEECH_FRAME:
                continue
            noise = next(rows)
            spoken += 1
            if request.keep:
                self.fed.append((latent[0].copy(), semantic[0].copy()))  # the arrays are memory of the server
            ready.append(audio[0])
            if len(ready) == request.chunk_frames:
                self._send(ready, spoken)
        self._send(ready, spoken)

    def _send(self, ready: list[np.ndarray], spoken: int) -> None:
        """Send the frames that are ready as one chunk, and empty the list."""
        if ready:
            self.channel.audio(ready[0] if len(ready) == 1 else np.concatenate(ready), spoken - len(ready))
            ready.clear()

    async def keep(self, model: str, script: str) -> None:
        """Give the client its session, to go on with later; it ends here. The marks say whose it is."""
        self._at_vocoder = False
        state = (await calls.close_vocoder(self.number)).copy()
        # In a thread: an hour of speech takes a tenth of a second, and others are speaking.
        self.channel.carry(await asyncio.to_thread(lambda: self._past(model, script, state).encode()))

    def _past(self, model: str, script: str, state: np.ndarray) -> Past:
        request = self.request
        latents = [latent for latent, _ in self.fed]
        semantics = [semantic for _, semantic in self.fed]
        tokens = np.array(self.tokens, np.int32)
        left = np.array(request.say[len(self.tokens) :], np.int32)
        before = request.past
        if before:
            latents, semantics = [*before.latents, *latents], [*before.semantics, *semantics]
            tokens = np.concatenate([before.tokens, tokens])
        stacked = (
            np.array(rows, np.float32).reshape(-1, size)
            for rows, size in ((latents, wire.LATENT_SIZE), (semantics, wire.SEMANTIC_SIZE))
        )
        return Past(model, script, request.seed, request.start_frame, tokens, *stacked, left, state)

    async def close(self) -> None:
        """End the session at every stage that may have it."""
        closing = [calls.close_llm(self.number)]
        if self._at_vocoder:
            closing.append(calls.close_vocoder(self.number))
        # A stage that never heard of the session answers with an error; there is nothing left to close then.
        await asyncio.gather(*closing, return_exceptions=True)


def _noise_rows(request: SpeechRequest):
    """A row [1, 64] for each speech frame that is still to come."""
    noise = np.random.default_rng(request.seed)
    if request.past:
        noise.standard_normal((request.past.frames, wire.LATENT_SIZE), np.float32)
    while True:
        yield noise.standard_normal((1, wire.LATENT_SIZE), np.float32)


def _last_of(past: Past | None) -> tuple[np.ndarray, np.ndarray]:
    """Latent [1, 64] and semantic features [1, 128] of the frame before the first to come."""
    if past is None or not past.frames:
        return calls.NO_LATENT, calls.NO_SEMANTIC
    return past.latents[-1:], past.semantics[-1:]
