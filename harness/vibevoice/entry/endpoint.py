"""The public entry: checks requests, admits their sessions, and runs them concurrently on one event loop.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from harness import wire
from harness.clock import Clock
from harness.errors import HarnessError, RequestError, ServerError
from harness.host import keys
from harness.vibevoice import backend
from harness.vibevoice.entry import stage_calls
from harness.vibevoice.entry.prompt import PromptBuilder, SpeechRequest
from harness.vibevoice.entry.talk import Channel, Talk
from harness.vibevoice.entry.tally import Tally
from harness.vibevoice.entry.tokenizer import tokenizer_for
from harness.vibevoice.entry.voices import frames_of, load_voices, new_voices
from harness.vibevoice.process import restarts
from harness.vibevoice.process.instances import instance_name, instances
from harness.vibevoice.process.parameters import number, parameters
from harness.vibevoice.sessions.admission import AdmissionQueue
from harness.vibevoice.sessions.carry import MOST_BYTES, Past, model_mark, script_mark
from harness.vibevoice.sessions.failures import ClientLeft
from harness.vibevoice.sessions.table import session_ids
from harness.vibevoice.sessions.turns import Turns
from harness.vibevoice.stages.configuration import config_of

if TYPE_CHECKING:  # they load torch, which an ensemble's entry process does not need
    from harness.vibevoice.engine.loop import Engine
    from harness.vibevoice.entry.engine_talk import EngineTalk

_OPTIONS = (
    wire.FRAMES,
    wire.START_FRAME,
    wire.CHUNK_FRAMES,
    wire.SEED,
    wire.GUIDANCE_SCALE,
    wire.DIFFUSION_STEPS,
    wire.UNTIL_END,
    wire.KEEP,
)
LONG_SCRIPT_BYTES = 16_000
MOST_TOKENS, MOST_SPEAKER_IDS = 2 * wire.MAX_FRAMES, 1024  # per request: more would block the event loop that all share
LEAVES_S = 0.1  # within which a client has left that leaves because of an error
SWITCH_S = 0.001  # switch interval, so that a thread that reads a script soon yields to those that speak


class Entry:
    """Serves the requests of one entry instance; all of its sessions run concurrently on its event loop.

    ``engine_of(args)`` returns the engine of this process; without it, the stages of the ensemble are called.
    """

    def __init__(self, args: dict, engine_of: Callable[[dict], Engine] | None = None):
        backend.begin()
        given = parameters(args)
        checkpoint, weights_seed = given.get("checkpoint", ""), int(given.get("weights_seed", 0))
        config = config_of(given["preset"], checkpoint)
        self.model = model_mark(given["preset"], weights_seed, checkpoint, bool(given.get("emulate")))
        self.carry_key = _carry_key(given.get("carry_key_file", ""))
        self.voice_folder = given.get("voices", "")
        self.voices = load_voices(self.voice_folder)
        voice_frames = {voice: frames_of(samples) for voice, samples in self.voices.items()}
        tokenizer = tokenizer_for(config, checkpoint)
        self.prompts = PromptBuilder(config, tokenizer, voice_frames, ends_by_itself=bool(checkpoint))
        self.emulated = bool(given.get("emulate"))
        self.beat_s = number(given, "beat_seconds")
        self.clock = Clock.of(given.get(wire.DILATION, ""))
        self.prefill_tokens = number(given, "prefill_tokens")
        self.prefills = Turns(1 if engine_of else number(given, "prefills_at_once"))
        self.long_scripts = asyncio.Semaphore(1)
        self.encoded_voices: dict[int, asyncio.Task] = {}
        self.executor: ThreadPoolExecutor | None = None
        self.channels: set[Channel] = set()
        places = max(1, number(given, "sessions_at_once") // instances(args))
        patience_s = number(given, "waiting_seconds")
        self.queue = AdmissionQueue(places, number(given, "waiting_limit"), patience_s)
        owner = wire.ENTRY, instance_name(args)
        self.tally = Tally(self.queue, owner)
        # A session holds two threads: one that speaks and one that sends, or two calls of stages when it closes.
        self.calls_at_once = 2 * places + 4
        self.session_ids = session_ids(os.getpid())
        self.engine = engine_of(args) if engine_of else None
        backend.export(owner, self.tally.readings)
        backend.settle()
        restarts.attend(args, backend.load_model, backend.identity_of(args, self.engine and self.engine.step))

    async def serve(self, requests: list) -> None:
        # The loop's default executor has a few threads per core: further sessions would wait for one while all stages
        # are idle.
        if self.executor is None:
            self.executor = ThreadPoolExecutor(self.calls_at_once, thread_name_prefix="stage-call")
            asyncio.get_running_loop().set_default_executor(self.executor)
            self.beating = asyncio.ensure_future(self._beat())
        await asyncio.gather(*(self._answer(request) for request in requests))

    def close(self) -> None:
        """End the engine and what is exported, when the model is unloaded."""
        if self.engine:
            self.engine.close()
        backend.close()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.beat_s / 5)
            for channel in list(self.channels):
                try:
                    channel.beat()
                except Exception as error:  # one channel's error must not affect the others
                    print(f"a sign of life could not be sent: {error}", flush=True)

    async def _answer(self, request) -> None:
        started = self.tally.first_audio_s.append
        channel = Channel(request.get_response_sender(), self.emulated, self.beat_s, started, self.clock)
        self.channels.add(channel)
        self.tally.begin(channel)
        try:
            if _is_set(request, wire.DESCRIBE):
                self.tally.forget(channel)
                channel.description(await asyncio.to_thread(restarts.identities))
            else:
                await self._admit(await self._checked(request), channel)
        except Exception as error:
            await self._end(channel, error)
        else:
            await self._end(channel)

    async def _end(self, channel: Channel, error: Exception | None = None) -> None:
        self.channels.discard(channel)  # first: nothing may follow the final response
        self.tally.end(channel, error)
        try:
            if error and not isinstance(error, ClientLeft):
                channel.fail(error)
                # Many clients leave as soon as they read an error. Triton (2.51) never frees a stream that is left
                # after its final response: 6 KB each.
                await asyncio.sleep(LEAVES_S)
        finally:
            channel.end()

    async def _checked(self, request) -> SpeechRequest:
        """The checked request. Raises HarnessError, marked as rejected, for what no retry can fix."""
        try:
            return await self._read(request)
        except HarnessError as error:
            raise type(error)(f"{wire.REFUSED}{error}") from error

    async def _read(self, request) -> SpeechRequest:
        given = {name: backend.optional(request, name) for name in _OPTIONS}
        options = {name: value.flat[0] for name, value in given.items() if value is not None and value.size}
        say, carry = backend.optional(request, wire.SAY), backend.optional(request, wire.CARRY)
        if say is not None and say.size:
            options[wire.SAY] = _at_most(MOST_TOKENS, say, wire.SAY).flatten().tolist()
        if carry is not None and carry.size:
            carried = _at_most(MOST_BYTES, carry, wire.CARRY)
            options[wire.CARRY] = await asyncio.to_thread(Past.decode, carried.tobytes(), self.carry_key)
        text = _required(request, wire.TEXT_INPUT).flat[0]
        speakers = _at_most(MOST_SPEAKER_IDS, _required(request, wire.SPEAKER_IDS), wire.SPEAKER_IDS)
        speaker_ids = speakers.flatten().tolist()
        if self.voice_folder and not {wire.NO_VOICE, *self.voices}.issuperset(speaker_ids):
            await asyncio.to_thread(self._hear_new_voices)
        # In a thread, since an hour's script takes 20 ms. Long ones one at a time: each thread makes all others wait
        # for the interpreter.
        async with self._long_script() if len(text) > LONG_SCRIPT_BYTES else contextlib.nullcontext():
            checked = await asyncio.to_thread(self.prompts.request, text, speaker_ids, options)
        if checked.past:
            checked.past.check_owner(self.model, self._script_mark(checked))
        return checked

    def _hear_new_voices(self) -> None:
        """Take over voices that were added to the folder since the start. The prompts know their lengths first."""
        found = new_voices(self.voice_folder, self.voices.keys())
        self.prompts.voice_frames.update({voice: frames_of(samples) for voice, samples in found.items()})
        self.voices |= found

    @contextlib.asynccontextmanager
    async def _long_script(self) -> AsyncIterator[None]:
        """Hold this while reading a long script, one at a time; its thread yields sooner to those that speak."""
        async with self.long_scripts:
            usual_s = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_S)
            try:
                yield
            finally:
                sys.setswitchinterval(usual_s)

    async def _admit(self, request: SpeechRequest, channel: Channel) -> None:
        """Serve a request once it is admitted."""
        channel.check()
        talk = self._talk(request, channel)
        await self.queue.enter(talk.open, channel.check)
        try:
            await self._speak(talk)
        finally:
            try:
                await talk.close()
            finally:
                self.queue.leave()

    def _talk(self, request: SpeechRequest, channel: Channel) -> Talk | EngineTalk:
        if self.engine:
            from harness.vibevoice.entry.engine_talk import EngineTalk

            return EngineTalk(self.engine, next(self.session_ids), request, channel)
        return Talk(self.session_ids, request, channel)

    async def _speak(self, talk: Talk | EngineTalk) -> None:
        heard = talk.request.prompt.voices if talk.request.to_read else ()
        voices = [await self._voice(voice) for voice in heard]
        await talk.prefill(voices, self.prefill_tokens, self.prompts.config.audio_token_id, self.prefills)
        await talk.speak(self.executor)
        if talk.request.keep:
            await talk.keep(self.model, self._script_mark(talk.request), self.carry_key)

    def _script_mark(self, request: SpeechRequest) -> str:
        return script_mark(request.prompt.token_ids, request.prompt.voices, self.voices)

    async def _voice(self, voice: int) -> np.ndarray:
        """Acoustic frames of a voice [frames, 64], encoded once; a failure is not cached."""
        if voice not in self.encoded_voices:
            self.encoded_voices[voice] = asyncio.ensure_future(self._encode(self.voices[voice]))
        try:
            return await asyncio.shield(self.encoded_voices[voice])
        except Exception:
            self.encoded_voices.pop(voice, None)
            raise

    async def _encode(self, samples: np.ndarray) -> np.ndarray:
        outputs = await stage_calls.call(wire.VOICE, {wire.WAVEFORM: samples[None]}, [wire.VOICE_FRAMES])
        return outputs[0].reshape(-1, wire.LATENT_SIZE)


def _carry_key(file: str) -> str:
    """The key of kept sessions. Raises ServerError where the configured key file cannot be used."""
    try:
        return keys.deployment_key(file)
    except ServerError as error:
        if file:
            raise
        print(f"sessions that are kept cannot be resumed by another server, or after a restart: {error}", flush=True)
        return secrets.token_hex(32)


def _required(request, name: str) -> np.ndarray:
    """A required input, with an error message for clients; Triton (2.51) does not detect that it is missing."""
    found = backend.optional(request, name)
    if found is None:
        raise RequestError(f"the request has no {name}: a script to speak and a voice for each speaker are needed")
    return found


def _at_most(most: int, value: np.ndarray, name: str) -> np.ndarray:
    """An input of limited size, checked before its values are used. Raises RequestError."""
    if value.size > most:
        raise RequestError(f"{name} has {value.size} values, but at most {most} are allowed: send fewer")
    return value


def _is_set(request, name: str) -> bool:
    value = backend.optional(request, name)
    return value is not None and value.size > 0 and bool(value.flat[0])
