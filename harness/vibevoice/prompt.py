"""A script and its voices as the model's prompt: token ids with places for the frames of each voice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness import wire
from harness.errors import RequestError, ScriptError
from harness.script import Turn, parse_script, validate_utf8

_SYSTEM = (
    " Transform the text provided by various speakers into speech output, "
    "utilizing the distinct voice of each respective speaker.\n"
)
FRAMES_PER_TEXT_TOKEN = 1.875  # how long a text speaks, where the request does not say


@dataclass(frozen=True)
class Prompt:
    """Token ids up to and without the final "speech begin"; ``voices`` are in the order of their places."""

    token_ids: tuple[int, ...]
    voices: tuple[int, ...]
    text_tokens: int


@dataclass(frozen=True)
class SpeechRequest:
    """A checked request, as the entry model serves it."""

    prompt: Prompt
    frames: int
    forced: bool
    start_frame: int
    chunk_frames: int
    seed: int
    guidance_scale: float


class PromptBuilder:
    """Turns requests into prompts for one model configuration, refusing what the model cannot speak."""

    def __init__(self, config, tokenizer, voice_frames: dict[int, int]):
        self.config = config
        self.tokenizer = tokenizer
        self.voice_frames = voice_frames  # voice id -> frames its sample takes
        self.context = config.text_config.max_position_embeddings

    def request(self, text: bytes, speaker_ids: Sequence[int], options: dict) -> SpeechRequest:
        """Check everything and build the prompt. Raises ScriptError or RequestError, worded for the client."""
        turns = parse_script(validate_utf8(text))
        prompt = self.prompt(turns, speaker_ids)
        asked = options.get(wire.FRAMES)
        estimated = max(1, min(wire.MAX_FRAMES, round(prompt.text_tokens * FRAMES_PER_TEXT_TOKEN)))
        frames = estimated if asked is None else int(asked)
        request = SpeechRequest(
            prompt=prompt,
            frames=frames,
            forced=True,
            start_frame=int(options.get(wire.START_FRAME, 0)),
            chunk_frames=int(options.get(wire.CHUNK_FRAMES, 1)),
            seed=int(options.get(wire.SEED, 0)),
            guidance_scale=float(options.get(wire.GUIDANCE_SCALE, wire.DEFAULT_GUIDANCE_SCALE)),
        )
        self._check(request)
        return request

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

    def _check(self, request: SpeechRequest) -> None:
        last = request.start_frame + request.frames
        checks = (
            (request.frames >= 1, f"{wire.FRAMES} is {request.frames}: ask for 1 to {wire.MAX_FRAMES} frames"),
            (request.start_frame >= 0, f"{wire.START_FRAME} is {request.start_frame}: it starts at 0"),
            (
                last <= wire.MAX_FRAMES,
                f"{wire.START_FRAME} {request.start_frame} + {wire.FRAMES} {request.frames} = {last} frames: "
                f"a request holds at most {wire.MAX_FRAMES} (90 minutes); cut it into parts",
            ),
            (request.chunk_frames >= 1, f"{wire.CHUNK_FRAMES} is {request.chunk_frames}: send at least 1 frame"),
            (
                0.0 <= request.guidance_scale <= 100.0,
                f"{wire.GUIDANCE_SCALE} is {request.guidance_scale}: use a number from 0 to 100",
            ),
        )
        for fine, message in checks:
            if not fine:
                raise RequestError(message)
        self._check_context(request, last)

    def _check_context(self, request: SpeechRequest, last: int) -> None:
        needed = len(request.prompt.token_ids) + 1 + last
        if needed > self.context:
            raise RequestError(
                f"the text and its voices take {len(request.prompt.token_ids)} tokens and the speech {last} frames: "
                f"{needed} positions, but the model's context holds {self.context}; shorten the script or ask for "
                "fewer frames"
            )


def prompt_chunks(token_ids: Sequence[int], size: int, audio_token_id: int) -> Iterator[tuple[Sequence[int], slice]]:
    """Cut a prompt for prefill: yields (token ids, slice of the voice frames whose places are among them)."""
    used = 0
    for start in range(0, len(token_ids), size):
        part = token_ids[start : start + size]
        places = sum(1 for token in part if token == audio_token_id)
        yield part, slice(used, used + places)
        used += places
