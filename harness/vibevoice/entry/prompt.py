"""A script and its voices as the model's prompt: token ids with placeholders for the frames of each voice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness import wire
from harness.errors import RequestError, ScriptError
from harness.traffic.script import Turn, parse_script, validate_utf8
from harness.vibevoice.sessions.carry import TOKENS, Past
from harness.vibevoice.sessions.parts import parts_of
from harness.vibevoice.sessions.table import SPARE_STEPS

_SYSTEM = (
    " Transform the text provided by various speakers into speech output, "
    "utilizing the distinct voice of each respective speaker.\n"
)
MOST_LINES = 20_000  # of a script: 90 minutes have less than a tenth of it, and each line costs time
MOST_BYTES_PER_TOKEN = 8  # of text, which has about 5: longer texts are refused before they are tokenized
FRAMES_PER_TEXT_TOKEN = 1.875  # estimated length of a text, where the request gives none
LONGEST_END_FRAMES, LONGEST_END = 64, 4  # room of a session without a number: this much more, this factor


@dataclass(frozen=True)
class Prompt:
    """Token ids before the final "speech begin"; ``voices`` are in the order of their placeholders."""

    token_ids: tuple[int, ...]
    voices: tuple[int, ...]
    text_tokens: int


@dataclass(frozen=True)
class SpeechRequest:
    """A checked request for the entry model. ``frames``: to be spoken now, after those of ``past``.

    ``forced``: exactly this many frames are spoken; otherwise at most this many, until the model generates "end of
    text".
    """

    prompt: Prompt
    frames: int
    forced: bool
    start_frame: int
    chunk_frames: int
    seed: int
    guidance_scale: float
    diffusion_steps: int = wire.DEFAULT_DIFFUSION_STEPS
    say: tuple[int, ...] = ()
    keep: bool = False
    past: Past | None = None

    @property
    def steps_behind(self) -> int:
        """Steps already taken when the session starts, whether computed or assumed."""
        return self.start_frame + (len(self.past.tokens) if self.past else 0)

    @property
    def to_read(self) -> tuple[int, ...]:
        """The prompt's tokens to be read; none where frames count as spoken, since the prompt then counts as read."""
        return () if self.start_frame else self.prompt.token_ids

    def past_parts(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The past part by part, as ``Past.parts``; none without one."""
        behind = len(self.prompt.token_ids) + self.start_frame
        return self.past.parts(size, behind) if self.past else iter(())

    @property
    def frames_behind(self) -> int:
        return self.start_frame + (self.past.frames if self.past else 0)


class PromptBuilder:
    """Turns requests into prompts for one model configuration; refuses what the model cannot speak.

    ``ends_by_itself``: the model can end a text, so a request without a number of frames runs until then.
    """

    def __init__(self, config, tokenizer, voice_frames: dict[int, int], ends_by_itself: bool = False):
        self.config = config
        self.tokenizer = tokenizer
        self.voice_frames = voice_frames  # voice id -> number of frames of its sample
        self.ends_by_itself = ends_by_itself
        self.context = config.text_config.max_position_embeddings

    def request(self, text: bytes, speaker_ids: Sequence[int], options: dict) -> SpeechRequest:
        """Check everything and build the prompt. ``options`` by their names in wire; CARRY is a decoded Past.

        Raises ScriptError or RequestError with a message for the client.
        """
        self._check_length(text)
        turns = parse_script(validate_utf8(text))
        until_end = bool(options.get(wire.UNTIL_END, self.ends_by_itself and wire.FRAMES not in options))
        past = options.get(wire.CARRY)
        say = options.get(wire.SAY, past.say if past else ())
        request = SpeechRequest(
            prompt=self.prompt(turns, speaker_ids),
            frames=int(options.get(wire.FRAMES, 1)),
            forced=not until_end,
            start_frame=past.start_frame if past else int(options.get(wire.START_FRAME, 0)),
            chunk_frames=int(options.get(wire.CHUNK_FRAMES, 1)),
            seed=past.seed if past else int(options.get(wire.SEED, 0)),
            guidance_scale=float(options.get(wire.GUIDANCE_SCALE, wire.DEFAULT_GUIDANCE_SCALE)),
            diffusion_steps=int(options.get(wire.DIFFUSION_STEPS, wire.DEFAULT_DIFFUSION_STEPS)),
            say=tuple(int(token) for token in say),
            keep=bool(options.get(wire.KEEP, False)),
            past=past,
        )
        if wire.FRAMES not in options:
            request = replace(request, frames=self._frames_of(request))
        if past and options.get(wire.START_FRAME, 0):
            raise RequestError(f"{wire.START_FRAME} and {wire.CARRY} exclude each other: a carry knows where it ended")
        self._check(request)
        return request

    def _frames_of(self, request: SpeechRequest) -> int:
        """Frames of a request that gives no number: as many as its text needs, or as many as there is room for."""
        most = wire.MAX_FRAMES - request.frames_behind
        if request.forced:
            asked = round(request.prompt.text_tokens * FRAMES_PER_TEXT_TOKEN) - request.frames_behind
        else:
            # Memory is reserved for all of them: bound them by the text, or a few short requests would fill it.
            longest = LONGEST_END_FRAMES + round(LONGEST_END * request.prompt.text_tokens * FRAMES_PER_TEXT_TOKEN)
            asked = min(longest, self.context - self._positions(replace(request, frames=0)))
        return max(1, min(most, asked))

    def prompt(self, turns: Sequence[Turn], speaker_ids: Sequence[int]) -> Prompt:
        """The prompt of a parsed script; ``speaker_ids[i]`` is the voice of speaker i + 1, 0 for none."""
        speakers = sorted({turn.speaker for turn in turns})
        self._check_voices(speakers, speaker_ids)
        voiced = [(s, speaker_ids[s - 1]) for s in speakers if speaker_ids[s - 1] != wire.NO_VOICE]
        ids = self._encode(_SYSTEM)
        if voiced:
            ids += self._encode(" Voice input:\n")
        for speaker, voice in voiced:
            ids += self._encode(f" Speaker {speaker - 1}:") + self._voice_place(voice) + self._encode("\n")
        text_ids = [i for turn in turns for i in self._encode(f" Speaker {turn.speaker - 1}: {turn.text}\n")]
        ids += self._encode(" Text input:\n") + text_ids + self._encode(" Speech output:\n")
        return Prompt(tuple(ids), tuple(voice for _, voice in voiced), len(text_ids))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def _voice_place(self, voice: int) -> list[int]:
        frames = [self.config.audio_token_id] * self.voice_frames[voice]
        return [self.config.audio_bos_token_id, *frames, self.config.audio_eos_token_id]

    def _check_voices(self, speakers: Sequence[int], speaker_ids: Sequence[int]) -> None:
        if len(speaker_ids) < max(speakers):
            raise ScriptError(
                f"{wire.SPEAKER_IDS} names {len(speaker_ids)} voices, but the script has a Speaker {max(speakers)}: "
                "give one voice id for each speaker, 0 for a speaker without a voice sample"
            )
        known = (wire.NO_VOICE, *self.voice_frames)
        for position, voice in enumerate(speaker_ids, start=1):
            if voice not in known:
                raise ScriptError(
                    f"unknown voice id {voice} for speaker {position} in {wire.SPEAKER_IDS}: "
                    f"use one of {', '.join(map(str, known))} (0 = no voice sample)"
                )

    def _check_length(self, text: bytes) -> None:
        most = MOST_BYTES_PER_TOKEN * self.context
        if len(text) > most:
            raise ScriptError(
                f"the script has {len(text)} bytes, but no text of more than {most} fits the model's context of "
                f"{self.context} tokens: cut it into parts"
            )
        lines = 1 + text.count(b"\n") + text.count(b"\r")
        if lines > MOST_LINES:
            raise ScriptError(
                f"the script has {lines} lines, more than {MOST_LINES}: leave out empty ones, or cut it into parts"
            )

    def _check(self, request: SpeechRequest) -> None:
        last = request.frames_behind + request.frames
        checks = (
            (request.frames >= 1, f"{wire.FRAMES} is {request.frames}: ask for 1 to {wire.MAX_FRAMES} frames"),
            (request.start_frame >= 0, f"{wire.START_FRAME} is {request.start_frame}: it starts at 0"),
            (
                last <= wire.MAX_FRAMES,
                f"{wire.CARRY if request.past else wire.START_FRAME} {request.frames_behind} + {wire.FRAMES} "
                f"{request.frames} = {last} frames: "
                f"a request holds at most {wire.MAX_FRAMES} (90 minutes); cut it into parts",
            ),
            (request.chunk_frames >= 1, f"{wire.CHUNK_FRAMES} is {request.chunk_frames}: send at least 1 frame"),
            (request.seed >= 0, f"{wire.SEED} is {request.seed}: use 0 or a larger number"),
            (
                0.0 <= request.guidance_scale <= 100.0,
                f"{wire.GUIDANCE_SCALE} is {request.guidance_scale}: use a number from 0 to 100",
            ),
            (
                1 <= request.diffusion_steps <= wire.MAX_DIFFUSION_STEPS,
                f"{wire.DIFFUSION_STEPS} is {request.diffusion_steps}: use 1 to {wire.MAX_DIFFUSION_STEPS}",
            ),
            (
                all(token in TOKENS for token in request.say),
                f"{wire.SAY} holds {', '.join(map(str, sorted(set(request.say) - set(TOKENS))[:5]))}: "
                "use 0 (speech frame), 1 (speech begin), 2 (speech end) and 3 (end of text)",
            ),
        )
        for fine, message in checks:
            if not fine:
                raise RequestError(message)
        self._check_context(request)

    def _positions(self, request: SpeechRequest) -> int:
        """Positions of the model's context that a request needs."""
        spare = 0 if request.forced else SPARE_STEPS
        return len(request.prompt.token_ids) + 1 + request.steps_behind + len(request.say) + request.frames + spare

    def _check_context(self, request: SpeechRequest) -> None:
        needed = self._positions(request)
        if needed > self.context:
            raise RequestError(
                f"the text and its voices take {len(request.prompt.token_ids)} tokens and the speech "
                f"{request.frames_behind + request.frames} frames: {needed} positions, but the model's context holds "
                f"{self.context}; shorten the script or ask for fewer frames"
            )


def prompt_chunks(token_ids: Sequence[int], size: int, audio_token_id: int) -> Iterator[tuple[Sequence[int], slice]]:
    """Split a prompt for prefill: yields (token ids, slice of the voice frames for the placeholders among them)."""
    used = 0
    for place in parts_of(len(token_ids), size):
        part = token_ids[place]
        places = sum(1 for token in part if token == audio_token_id)
        yield part, slice(used, used + places)
        used += places
