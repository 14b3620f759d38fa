"""One session of the entry that the engine of the same process speaks: opened, read, spoken, kept, closed.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

import numpy as np

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.engine.frame_step import Opening
from harness.vibevoice.engine.loop import Engine, PromptToRead, Speech, noise_rows
from harness.vibevoice.entry.prompt import SpeechRequest
from harness.vibevoice.entry.talk import Channel, past_of
from harness.vibevoice.sessions.failures import in_words

# How often a session asks whether its client is still there: of few, within a frame of 0.13 s; each question is a call
# of the server's process, and all are asked from one thread.
CHECK_S, CHECKS_PER_S = 0.1, 320


class EngineTalk:
    """A session of the engine, from ``open`` to ``close``; ``number`` is its id there."""

    def __init__(self, engine: Engine, number: int, request: SpeechRequest, channel: Channel):
        self.engine, self.number, self.request, self.channel = engine, number, request, channel
        self.speech: Speech | None = None

    async def open(self) -> None:
        """Take room. Raises Busy where there is none now."""
        request, past = self.request, self.request.past
        last = (past.latents[-1], past.semantics[-1]) if past and past.frames else (None, None)
        opening = Opening(
            len(request.prompt.token_ids), request.steps_behind + request.frames, request.start_frame, request.forced,
            tuple(request.say), past.state if past else None, *last,
        )  # fmt: skip
        try:
            await self._called(self.engine.step.open, self.number, opening)
        except RequestError as error:
            raise in_words(str(error)) if str(error).startswith(wire.BUSY) else error from None
        prompt = PromptToRead(self.number, (), np.empty((0, wire.LATENT_SIZE), np.float32), -1)  # see ``prefill``
        noise = noise_rows(request.seed, past.frames if past else 0)
        self.speech = Speech(
            self.number, prompt, request.frames, noise, self.channel.audio, request.guidance_scale,
            request.diffusion_steps, request.chunk_frames, request.keep,
        )  # fmt: skip

    async def prefill(self, voices: list[np.ndarray], part_tokens: int, audio_token_id: int, _) -> None:
        """Lay out prompt and past, which the engine reads by turns with those of others."""
        frames = np.concatenate(voices) if voices else np.empty((0, wire.LATENT_SIZE), np.float32)
        self.speech.prompt = PromptToRead(self.number, self.request.to_read, frames, audio_token_id)
        if self.request.past:
            self.speech.past.extend(self.request.past.parts(part_tokens))
            # In a thread: the noise of an hour's frames is skipped in a tenth of a second, and others are speaking.
            await asyncio.to_thread(self.speech.row)

    async def speak(self, _: Executor) -> None:
        """Speak until all frames are spoken, or the model says "end of text". Raises ClientLeft."""
        self.engine.submit(self.speech)
        done = asyncio.wrap_future(self.speech.done)
        done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody asks where a client left
        while not done.done():
            await asyncio.wait([done], timeout=max(CHECK_S, self.engine.sessions / CHECKS_PER_S))
            self.channel.check()
        await done

    async def keep(self, model: str, script: str, key: str) -> None:
        """Give the client its session to go on with later; it ends. The marks say whose it is; ``key`` seals it."""
        speech, state = self.speech, await asyncio.wrap_future(self.engine.end(self.speech, keep=True))
        past = lambda: past_of(self.request, speech.tokens, speech.fed, model, script, state)  # noqa: E731
        # In a thread: an hour of speech takes a tenth of a second, and others are speaking.
        self.channel.carry(await asyncio.to_thread(lambda: past().encode(key)))

    async def close(self) -> None:
        """End the session; after it, nothing more of it is sent."""
        await asyncio.wrap_future(self.engine.end(self.speech))
        await asyncio.to_thread(self.speech.wait_sent)

    async def _called(self, function, *arguments):
        return await asyncio.wrap_future(self.engine.call(function, *arguments))
