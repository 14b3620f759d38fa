"""The released implementation as a reference: the audio that ``generate`` of transformers gives for one request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import transformers.models.vibevoice.generation_vibevoice as generation
from model import prompt_builder
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    VibeVoiceForConditionalGeneration,
)

from harness import wire
from harness.records.schema import Request
from harness.vibevoice.entry.prompt import Prompt
from harness.vibevoice.entry.voices import frames_of, load_voices
from harness.vibevoice.stages.presets import Weights, randomise_
from harness.vibevoice.stages.released import released_config


@dataclass(frozen=True)
class Spoken:
    """The output of ``generate``: audio, float32 [frames x 3200], and its tokens (wire.TOKEN_*)."""

    audio: np.ndarray
    tokens: tuple[int, ...]


class Reference:
    """The whole model of transformers, with the weights that the stages of a deployment build.

    In float64 it shows how much ``generate`` in float32 differs by rounding alone.
    """

    def __init__(self, weights: Weights, voices: str = "", dtype: torch.dtype = torch.float32):
        self.weights, self.config, self.dtype = weights, weights.config, dtype
        self.model = full_model(weights).to(dtype)
        self.voices = load_voices(voices)
        self.special = {
            wire.TOKEN_SPEECH_FRAME: self.config.audio_token_id,
            wire.TOKEN_SPEECH_BEGIN: self.config.audio_bos_token_id,
            wire.TOKEN_SPEECH_END: self.config.audio_eos_token_id,
            wire.TOKEN_END_OF_TEXT: self.config.eos_token_id,
        }
        self.prompts = prompt_builder(self.config, str(weights.checkpoint or ""), voices)

    def speak(self, request: Request, max_tokens: int | None = None) -> Spoken:
        """The audio of a request with its session alone; ``max_tokens`` limits a model that does not end by itself."""
        checked = self.prompts.request(request.script.encode(), request.speaker_ids, {wire.FRAMES: request.frames})
        ids = torch.tensor([[*checked.prompt.token_ids, self.config.audio_bos_token_id]])
        told = Told(self.special, request, len(ids[0]))
        with self._given(told, noise_rows(request.seed)), torch.inference_mode():
            answer = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens or request.frames + len(request.say) + 1,
                guidance_scale=float(np.float32(request.guidance_scale)),
                num_diffusion_steps=request.diffusion_steps,
                do_sample=False,
                return_dict_in_generate=True,
                **self._voice_inputs(checked.prompt),
            )
        names = {token_id: token for token, token_id in self.special.items()}
        tokens = tuple(names[i] for i in answer.sequences[0, len(ids[0]) :].tolist())
        audio = answer.audio[0]  # None if nothing was spoken
        return Spoken(np.empty(0, np.float32) if audio is None else audio.flatten().numpy(), tokens)

    def _voice_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Voice samples, padded to one length: waveforms [voices, 1, samples] and the mask of real samples."""
        if not prompt.voices:
            return {}
        samples = [torch.tensor(self.voices[voice]) for voice in prompt.voices]
        length = max(frames_of(one) for one in samples) * wire.SAMPLES_PER_FRAME
        values, mask = torch.zeros(len(samples), 1, length), torch.zeros(len(samples), length, dtype=torch.bool)
        for row, one in enumerate(samples):
            values[row, 0, : len(one)], mask[row, : len(one)] = one, True
        return {"input_values": values.to(self.dtype), "padding_mask": mask}

    @contextlib.contextmanager
    def _given(self, told: Told, noise: Iterator[torch.Tensor]) -> Iterator[None]:
        """For one call of ``generate``: this noise, these tokens, and voices encoded without random noise."""
        model, randn, encode = self.model, torch.randn, self.model.model.audio_tower.encode
        own = lambda *args, **kw: LogitsProcessorList([*own_processors(model, *args, **kw), told])  # noqa: E731
        given = lambda *shape, **kw: next(noise).repeat(shape[0], 1) if shape[1:] == (64,) else randn(*shape, **kw)  # noqa: E731
        plain = lambda values, sample=True, **kw: encode(values, sample=False, **kw)  # noqa: E731
        with (
            default_dtype(self.dtype),
            mock.patch.object(model, "_get_logits_processor", own),
            mock.patch.object(generation.torch, "randn", given),
            mock.patch.object(model.model.audio_tower, "encode", plain),
        ):
            yield


def own_processors(model, *args, **kw) -> list[LogitsProcessor]:
    """The logits processors of the model, without the text guidance that a guidance scale also enables.

    That guidance is ``generate``'s own for every model: a third pass over bare token ids. The released code has none.
    """
    found = type(model)._get_logits_processor(model, *args, **kw)
    return [one for one in found if not isinstance(one, UnbatchedClassifierFreeGuidanceLogitsProcessor)]


class Told(LogitsProcessor):
    """Forces the tokens of a request: first ``say``; then frames, or the model's choice; finally "end of text"."""

    def __init__(self, special: dict[int, int], request: Request, prompt_tokens: int):
        self.special, self.request, self.prompt_tokens = special, request, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids[0, self.prompt_tokens :].tolist()
        token = self._next(said)
        if token is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.special[token]] = 0
        return forced

    def _next(self, said: list[int]) -> int | None:
        request = self.request
        if said.count(self.special[wire.TOKEN_SPEECH_FRAME]) >= request.frames:
            return wire.TOKEN_END_OF_TEXT
        if len(said) < len(request.say):
            return request.say[len(said)]
        return None if request.until_end else wire.TOKEN_SPEECH_FRAME


def full_model(weights: Weights) -> VibeVoiceForConditionalGeneration:
    """The model of a checkpoint folder in float32, or of the preset with the same random weights as the stages."""
    if weights.checkpoint:
        model = VibeVoiceForConditionalGeneration.from_pretrained(weights.checkpoint, dtype=torch.float32)
    else:
        model = VibeVoiceForConditionalGeneration(released_config(weights.config))
        randomise_(model, weights.seed)
    model.generation_config.eos_token_id = weights.config.eos_token_id
    return model.eval()


def noise_rows(seed: int) -> Iterator[torch.Tensor]:
    """The noise of a session's speech frames, one row [64] after another."""
    noise = np.random.default_rng(seed)
    while True:
        yield torch.from_numpy(noise.standard_normal(wire.LATENT_SIZE, np.float32))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
