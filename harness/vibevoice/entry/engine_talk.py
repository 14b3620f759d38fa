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
from harness.vibevoice.sessions.failures import described

# How often a session checks that its client is still connected: with few sessions, within a frame (0.13 s). Each check
# is a call to the server's process, and one thread makes all of them.
CHECK_S, CHECKS_PER_S = 0.1, 320


class EngineTalk:
    """A session of the engine, from ``open`` to ``close``; ``number`` is its id there."""

    def __init__(self, engine: Engine, number: int, request: SpeechRequest, channel: Channel):
        self.engine, self.number, self.request, self.channel = engine, number, request, channel
        self.speech: Speech | None = None

    async def open(self) -> None:
        """Reserve room for the session. Raises Busy where there is none now."""
        request, past = self.request, self.request.past
        last = (past.latents[-1], past.semantics[-1]) if past and past.frames else (None, None)
        opening = Opening(
            len(request.prompt.token_ids), request.steps_behind + request.frames, request.start_frame, request.forced,
            tuple(request.say), past.state if past else None, *last,
        )  # fmt: skip
        try:
            await self._called(self.engine.step.open, self.number, opening)
        except RequestError as error:
            raise described(str(error)) if str(error).startswith(wire.BUSY) else error from None
        prompt = PromptToRead(self.number, (), np.empty((0, wire.LATENT_SIZE), np.float32), -1)  # see ``prefill``
        noise = noise_rows(request.seed, past.frames if past else 0)
        self.speech = Speech(
            self.number, prompt, request.frames, noise, self.channel.audio, request.guidance_scale,
            request.diffusion_steps, request.chunk_frames, request.keep,
        )  # fmt: skip

    async def prefill(self, voices: list[np.ndarray], part_tokens: int, audio_token_id: int, _) -> None:
        """Queue prompt and past, which the engine reads in turn with those of other sessions."""
        frames = np.concatenate(voices) if voices else np.empty((0, wire.LATENT_SIZE), np.float32)
        self.speech.prompt = PromptToRead(self.number, self.request.to_read, frames, audio_token_id)
        if self.request.past:
            self.speech.past.extend(self.request.past_parts(part_tokens))
            # In a thread: skipping the noise of an hour's frames takes a tenth of a second, while others speak.
            await asyncio.to_thread(self.speech.row)

    async def speak(self, _: Executor) -> None:
        """Speak until all frames are spoken, or the model generates "end of text". Raises ClientLeft."""
        self.engine.submit(self.speech)
        done = asyncio.wrap_future(self.speech.done)
        done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # else asyncio logs it
        while not done.done():
            await asyncio.wait([done], timeout=max(CHECK_S, self.engine.sessions / CHECKS_PER_S))
            self.channel.check()
        await done

    async def keep(self, model: str, script: str, key: str) -> None:
        """Send the client its session for resuming it later, and end it.

        ``model`` and ``script`` are the fingerprints stored with it; ``key`` authenticates it.
        """
        speech, state = self.speech, await asyncio.wrap_future(self.engine.end(self.speech, keep=True))
        past = lambda: past_of(self.request, speech.tokens, speech.fed, model, script, state)  # noqa: E731
        # In a thread: an hour of speech takes a tenth of a second, while others speak.
        self.channel.carry(await asyncio.to_thread(lambda: past().encode(key)))

    async def close(self) -> None:
        """End the session; nothing more of it is sent afterwards."""
        await asyncio.wrap_future(self.engine.end(self.speech))
        await asyncio.to_thread(self.speech.wait_sent)

    async def _called(self, function, *arguments):
        return await asyncio.wrap_future(self.engine.call(function, *arguments))
