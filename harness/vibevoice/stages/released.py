"""The configuration as transformers' own class, for comparing and counting with its modules."""

from __future__ import annotations

from dataclasses import asdict

from transformers import VibeVoiceConfig

from harness.vibevoice.stages.configuration import ModelConfig

_TYPES = {
    "text_config": "qwen2",
    "diffusion_head_config": "vibevoice_diffusion",
    "audio_config": "vibevoice_acoustic_tokenizer",
    "semantic_model_config": "vibevoice_acoustic_tokenizer_encoder",
}


def released_config(config: ModelConfig) -> VibeVoiceConfig:
    parts = asdict(config)
    return VibeVoiceConfig(**{**parts, **{name: {"model_type": _TYPES[name], **parts[name]} for name in _TYPES}})
