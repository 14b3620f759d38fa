"""The entry's frame loop: one coroutine per request, calling the voice encoder, the stages and the ensemble.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb

from harness import wire
from harness.errors import HarnessError
from harness.vibevoice import backend
from harness.vibevoice.presets import Weights
from harness.vibevoice.prompt import PromptBuilder, SpeechRequest, prompt_chunks
from harness.vibevoice.tokenizer import tokenizer_for
from harness.vibevoice.voices import frames_of, load_voices

_OPTIONS = (wire.FRAMES, wire.START_FRAME, wire.CHUNK_FRAMES, wire.SEED, wire.GUIDANCE_SCALE)
_NO_LATENT = np.zeros((1, wire.LATENT_SIZE), np.float32)
_NO_SEMANTIC = np.zeros((1, wire.SEMANTIC_SIZE), np.float32)
_NOT_A_FRAME = np.full((1, 1), wire.TOKEN_SPEECH_BEGIN, np.int32)


SESSIONS_AT_ONCE = 250  # of one entry instance; below the sequence slots of a stage, or opening would wait for them
CALLS_AT_ONCE = 2 * SESSIONS_AT_ONCE


class ClientLeft(Exception):
    """The client cancelled its stream."""


class Entry:
    """Serves requests of one entry instance; sessions of all of them run side by side on its event loop."""

    def __init__(self, args: dict):
        given = backend.parameters(args)
        config = Weights(given["preset"], checkpoint=given.get("checkpoint", "")).config
        self.voices = load_voices(given.get("voices", ""))
        voice_frames = {voice: frames_of(samples) for voice, samples in self.voices.items()}
        tokenizer = tokenizer_for(config, given.get("checkpoint", ""))
        self.prompts = PromptBuilder(config, tokenizer, voice_frames)
        self.prefill_tokens = int(given["prefill_tokens"])
        self.encoded_voices: dict[int, asyncio.Task] = {}
        self.executor: ThreadPoolExecutor | None = None
        self.places = asyncio.Semaphore(SESSIONS_AT_ONCE)
        # Unique among the entry instances of a server: each is a process of its own.
        self.session_ids = itertools.count((os.getpid() << 32) + 1)

    async def serve(self, requests: list) -> None:
        # A call to a stage holds a thread of the loop's executor until it is answered. The default one has a few
        # per core: sessions beyond that would wait for a thread, with every stage idle.
        if self.executor is None:
            self.executor = ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="stage-call")
            asyncio.get_running_loop().set_default_executor(self.executor)
        await asyncio.gather(*(self._answer(request) for request in requests))

    async def _answer(self, request) -> None:
        sender = request.get_response_sender()
        final = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            checked = self._checked(request)
            async with self.places:
                _stop_if_left(sender)
                await self._speak(checked, sender)
            sender.send(flags=final)
        except ClientLeft:
            sender.send(flags=final)
        except Exception as error:
            sender.send(backend.failure(error), flags=final)

    def _checked(self, request) -> SpeechRequest:
        given = {name: backend.optional(request, name) for name in _OPTIONS}
        options = {name: value.flat[0] for name, value in given.items() if value is not None and value.size}
        text = backend.optional(request, wire.TEXT_INPUT).flat[0]
        speaker_ids = backend.optional(request, wire.SPEAKER_IDS).flatten().tolist()
        return self.prompts.request(text, speaker_ids, options)

    async def _speak(self, request: SpeechRequest, sender) -> None:
        session = next(self.session_ids)
        voices = [await self._voice(voice) for voice in request.prompt.voices]
        try:
            await self._open(session, request, voices, sender)
            await self._frames(session, request, sender)
        finally:
            await self._close(session)

    async def _voice(self, voice: int) -> np.ndarray:
        """Acoustic frames of a voice [frames, 64], encoded once; a failed try is not remembered."""
        if voice not in self.encoded_voices:
            self.encoded_voices[voice] = asyncio.ensure_future(self._encode(self.voices[voice]))
        try:
            return await asyncio.shield(self.encoded_voices[voice])
        except Exception:
            self.encoded_voices.pop(voice, None)
            raise

    async def _encode(self, samples: np.ndarray) -> np.ndarray:
        outputs = await _call(wire.VOICE, {wire.WAVEFORM: samples[None]}, [wire.VOICE_FRAMES])
        return outputs[0].reshape(-1, wire.LATENT_SIZE)

    async def _open(self, session: int, request: SpeechRequest, voices: list[np.ndarray], sender) -> None:
        """Send the prompt part by part, so that sessions that are speaking step in between."""
        ids, start = request.prompt.token_ids, request.start_frame
        shape = np.array([[len(ids), start + request.frames, start, request.forced]], np.int32)
        frames = np.concatenate(voices) if voices else np.empty((0, wire.LATENT_SIZE), np.float32)
        flags = backend.START
        for part, places in prompt_chunks(ids, self.prefill_tokens, self.prompts.config.audio_token_id):
            _stop_if_left(sender)
            inputs = {
                wire.SESSION: shape,
                wire.TOKEN_IDS: np.array([part], np.int32),
                wire.VOICE_FRAMES: frames[places].reshape(1, -1),
            }
            await _call(wire.LLM, inputs, [wire.TOKEN], session, flags)
            flags = 0
        await self._vocoder(session, backend.START)

    async def _frames(self, session: int, request: SpeechRequest, sender) -> None:
        noise = np.random.default_rng(request.seed)
        guidance = np.array([[request.guidance_scale]], np.float32)
        steps = np.array([[wire.DEFAULT_DIFFUSION_STEPS]], np.int32)
        latent, semantic, ready, sent = _NO_LATENT, _NO_SEMANTIC, [], 0
        outputs = [wire.AUDIO, wire.LATENT, wire.SEMANTIC, wire.TOKEN]
        while sent + len(ready) < request.frames:
            _stop_if_left(sender)
            inputs = {
                wire.PREVIOUS_LATENT: latent,
                wire.PREVIOUS_SEMANTIC: semantic,
                wire.NOISE: noise.standard_normal((1, wire.LATENT_SIZE), np.float32),
                wire.GUIDANCE: guidance,
                wire.STEPS: steps,
            }
            audio, latent, semantic, token = await _call(wire.FRAME, inputs, outputs, session)
            if token.flat[0] == wire.TOKEN_END_OF_TEXT:
                break
            if token.flat[0] == wire.TOKEN_SPEECH_FRAME:
                ready.append(audio)
            if len(ready) == request.chunk_frames:
                sent += _send(sender, ready, sent)
        _send(sender, ready, sent)

    async def _close(self, session: int) -> None:
        inputs = {wire.TOKEN_IDS: np.zeros((1, 1), np.int32)}
        closing = (_call(wire.LLM, inputs, [wire.TOKEN], session, backend.END), self._vocoder(session, backend.END))
        # A stage that never heard of the session answers with an error; there is nothing left to close then.
        await asyncio.gather(*closing, return_exceptions=True)

    async def _vocoder(self, session: int, flags: int) -> None:
        await _call(wire.VOCODER, {wire.LATENT: _NO_LATENT, wire.TOKEN: _NOT_A_FRAME}, [wire.SEMANTIC], session, flags)


async def _call(model: str, inputs: dict[str, np.ndarray], outputs: list[str], session: int = 0, flags: int = 0):
    """Call a model of this server; returns its outputs as arrays in the order of their names."""
    request = pb.InferenceRequest(
        model_name=model,
        inputs=[pb.Tensor(name, value) for name, value in inputs.items()],
        requested_output_names=outputs,
        correlation_id=session,
        flags=flags,
    )
    answer = await request.async_exec()
    if answer.has_error():
        raise StageError(answer.error().message())
    return [pb.get_output_tensor_by_name(answer, name).as_numpy() for name in outputs]


class StageError(HarnessError):
    """A stage refused or failed; the message is the stage's own."""


def _send(sender, ready: list[np.ndarray], index: int) -> int:
    """Send the frames that are ready as one chunk and empty the list; returns how many there were."""
    if not ready:
        return 0
    audio = ready[0][0] if len(ready) == 1 else np.concatenate(ready, axis=1)[0]
    tensors = {
        wire.AUDIO_OUTPUT: audio,
        wire.FRAME_INDEX: np.array([index], np.int32),
        wire.SENT_AT_NS: np.array([time.monotonic_ns()], np.int64),
    }
    sender.send(backend.response(**tensors))
    count = len(ready)
    ready.clear()
    return count


def _stop_if_left(sender) -> None:
    if sender.is_cancelled():
        raise ClientLeft
