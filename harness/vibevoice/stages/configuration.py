"""The model's configuration: its sizes by preset, from a file of sizes, or from a checkpoint's config.json.

Names, defaults and values are those of transformers' ``VibeVoiceConfig``, whose import takes longer than torch's;
tests/vibevoice/test_configuration.py checks that they agree. Neither is imported here: the entry and the command line
need only the sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

from harness.errors import InputError

MODEL_TYPE = "vibevoice"
_DEFAULT_ROPE_THETA = 10_000.0  # if config.json has no rotary base


def _rope() -> dict:
    return {"rope_type": "default", "rope_theta": _DEFAULT_ROPE_THETA}


@dataclass(frozen=True)
class TextConfig:
    """The backbone, a Qwen2."""

    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    intermediate_size: int = 22_016
    vocab_size: int = 151_936
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_parameters: dict = field(default_factory=_rope)


@dataclass(frozen=True)
class HeadConfig:
    """The diffusion head."""

    hidden_size: int = 1536
    latent_size: int = 64
    num_hidden_layers: int = 4
    intermediate_size: int = 4608
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    frequency_embedding_size: int = 256
    diffusion_max_period: int = 10_000


@dataclass(frozen=True)
class TowerConfig:
    """A convolution tower, or the encoder and the decoder of the acoustic tokenizer."""

    hidden_size: int = 64
    channels: int = 1
    kernel_size: int = 7
    num_filters: int = 32
    downsampling_ratios: tuple[int, ...] = (2, 2, 4, 5, 5, 8)
    depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3, 8)
    ffn_expansion: int = 4
    rms_norm_eps: float = 1e-5
    hidden_act: str = "gelu"

    @property
    def encoder_config(self) -> TowerConfig:
        return self

    @property
    def decoder_config(self) -> TowerConfig:
        return replace(self, depths=self.depths[::-1])

    @property
    def upsampling_ratios(self) -> tuple[int, ...]:
        return self.downsampling_ratios[::-1]


@dataclass(frozen=True)
class ModelConfig:
    text_config: TextConfig = TextConfig()
    diffusion_head_config: HeadConfig = HeadConfig()
    audio_config: TowerConfig = TowerConfig()
    semantic_model_config: TowerConfig = TowerConfig(hidden_size=128)
    pad_token_id: int = 151_643
    eos_token_id: int = 151_643
    audio_bos_token_id: int = 151_652
    audio_eos_token_id: int = 151_653
    audio_token_id: int = 151_654

    def __post_init__(self):
        """Derive sizes: the diffusion head is as wide as the backbone, and its latents have the tokenizer's size."""
        sizes = {"hidden_size": self.text_config.hidden_size, "latent_size": self.audio_config.hidden_size}
        object.__setattr__(self, "diffusion_head_config", replace(self.diffusion_head_config, **sizes))


_TOKENS = ("pad_token_id", "eos_token_id", "audio_bos_token_id", "audio_eos_token_id", "audio_token_id")
_TOKENIZER_DEPTHS = (3, 3, 3, 3, 3, 3, 8)


def _config(text: dict, head: dict, filters: int, depths: tuple[int, ...], tokens: dict) -> ModelConfig:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return ModelConfig(
        text_config=TextConfig(rope_parameters=rope, **text),
        diffusion_head_config=HeadConfig(**head),
        audio_config=TowerConfig(hidden_size=64, num_filters=filters, depths=depths),
        semantic_model_config=TowerConfig(hidden_size=128, num_filters=filters, depths=depths),
        **tokens,
    )


def _tiny() -> ModelConfig:
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 4096,
        "max_position_embeddings": 65_536,
        "tie_word_embeddings": True,
    }
    tokens = {
        "pad_token_id": 4092,
        "eos_token_id": 4092,
        "audio_bos_token_id": 4093,
        "audio_eos_token_id": 4094,
        "audio_token_id": 4095,
    }
    return _config(text, {"num_hidden_layers": 2, "intermediate_size": 192}, 2, (1,) * 7, tokens)


def _b1_5() -> ModelConfig:
    text = {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151_936,
        "max_position_embeddings": 65_536,
        "tie_word_embeddings": True,
    }
    return _config(text, {"num_hidden_layers": 4, "intermediate_size": 4608}, 32, _TOKENIZER_DEPTHS, {})


def _b7() -> ModelConfig:
    text = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 152_064,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
    }
    return _config(text, {"num_hidden_layers": 4, "intermediate_size": 10_752}, 32, _TOKENIZER_DEPTHS, {})


PRESETS = {"tiny": _tiny, "1.5b": _b1_5, "7b": _b7}


_TEXT_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_OWN_SHAPE = ("base", *_TEXT_SIZES, "num_filters", "depths", "head_layers", "head_intermediate_size")


def config_of(preset: str, checkpoint: str = "") -> ModelConfig:
    """The configuration of a checkpoint folder or, without one, of a preset. Raises InputError."""
    return checkpoint_config(Path(checkpoint)) if checkpoint else preset_config(preset)


def preset_config(preset: str) -> ModelConfig:
    """The configuration of a preset: ``tiny``, ``1.5b``, ``7b``, or a JSON file with sizes that differ from one.

    Such a file names its ``base`` (default tiny) and any of hidden_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads, intermediate_size, vocab_size, max_position_embeddings (the backbone's), num_filters, depths
    (of the convolution towers), head_layers, head_intermediate_size (of the diffusion head).
    Raises InputError for an unknown name and for sizes that do not fit together.
    """
    if preset in PRESETS:
        return PRESETS[preset]()
    if preset.endswith(".json"):
        return _own_shape(Path(preset))
    raise InputError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}, or a .json file of sizes")


def _own_shape(path: Path) -> ModelConfig:
    try:
        sizes = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"preset {path} cannot be read as JSON: {error}") from error
    unknown = [key for key in sizes if key not in _OWN_SHAPE] if isinstance(sizes, dict) else ["(not an object)"]
    if unknown:
        raise InputError(f"preset {path} has unknown keys {', '.join(unknown)}: use {', '.join(_OWN_SHAPE)}")
    base = sizes.get("base", "tiny")
    if base not in list(PRESETS):  # its value may be unhashable
        raise InputError(f"preset {path} has base {base!r}: use one of {', '.join(PRESETS)}")
    return _resized(PRESETS[base](), sizes, path)


def _resized(base: ModelConfig, sizes: dict, path: Path) -> ModelConfig:
    text = {key: sizes.get(key, getattr(base.text_config, key)) for key in _TEXT_SIZES}
    head = base.diffusion_head_config
    head_sizes = {
        "num_hidden_layers": sizes.get("head_layers", head.num_hidden_layers),
        "intermediate_size": sizes.get("head_intermediate_size", head.intermediate_size),
    }
    depths = sizes.get("depths", list(base.audio_config.depths))
    filters = sizes.get("num_filters", base.audio_config.num_filters)
    for fits, rule in _rules(base, text, [*head_sizes.values(), filters], depths):
        if not fits:
            raise InputError(f"preset {path} has sizes that do not fit together; required: {rule}")
    text["tie_word_embeddings"] = base.text_config.tie_word_embeddings
    tokens = {name: getattr(base, name) for name in _TOKENS}
    return _config(text, head_sizes, filters, tuple(depths), tokens)


def _rules(base: ModelConfig, text: dict, others: list, depths) -> Iterator[tuple[bool, str]]:
    """Whether sizes fit together, rule by rule; a rule may rely on earlier ones."""
    counts = len(base.audio_config.depths)
    yield isinstance(depths, list) and len(depths) == counts, f"depths has {counts} numbers"
    whole = all(type(size) is int for size in (*text.values(), *others, *depths))
    yield whole and min(*text.values(), *others, 1 + min(depths)) >= 1, "every size is a whole number of at least 1"
    yield text["hidden_size"] % (2 * text["num_attention_heads"]) == 0, "hidden_size is heads times an even number"
    yield text["num_attention_heads"] % text["num_key_value_heads"] == 0, "heads are a multiple of KV heads"
    yield text["vocab_size"] >= base.text_config.vocab_size, f"vocab_size is at least {base.text_config.vocab_size}"


def checkpoint_config(folder: Path) -> ModelConfig:
    """The configuration in a folder. Raises InputError for another model's, and for values of a wrong type."""
    try:
        held = json.loads((folder / "config.json").read_text())
        model_type = held["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder} is not a checkpoint folder: its config.json cannot be read: {error!r}") from error
    if model_type != MODEL_TYPE:
        raise InputError(f"{folder} holds a model of type {model_type}: give one of type {MODEL_TYPE}")
    try:
        return _model_of(held)
    except InputError as error:
        raise InputError(f"the config.json of checkpoint {folder} cannot be used: {error}") from error


def _model_of(held: dict) -> ModelConfig:
    default = ModelConfig()
    parts = {
        "text_config": _part(held, "text_config", default.text_config, _text_of),
        "diffusion_head_config": _part(held, "diffusion_head_config", default.diffusion_head_config),
        "audio_config": _part(held, "audio_config", default.audio_config),
        "semantic_model_config": _part(held, "semantic_model_config", TowerConfig()),
    }
    # transformers' default of 128 features belongs to a part that is left out
    if held.get("semantic_model_config") is None:
        parts["semantic_model_config"] = default.semantic_model_config
    tokens = {name: held.get(name, getattr(default, name)) for name in _TOKENS}
    return replace(default, **parts, **{name: _typed(name, id_, 0) for name, id_ in tokens.items()})


_Part = TypeVar("_Part", TextConfig, HeadConfig, TowerConfig)


def _part(held: dict, name: str, default: _Part, derived: Callable[[dict], dict] = lambda given: {}) -> _Part:
    """A part of config.json with defaults filled in, without what no stage needs."""
    given = {} if held.get(name) is None else held[name]
    if not isinstance(given, dict):
        raise InputError(f"{name} is {given!r}: it must be an object")
    given = {**given, **derived(given)}
    known = {each.name: getattr(default, each.name) for each in fields(default) if each.name in given}
    return replace(default, **{key: _typed(f"{name}.{key}", given[key], like) for key, like in known.items()})


def _text_of(given: dict) -> dict:
    """The backbone's part with derived values: null KV heads equal the heads, positions may be under older keys."""
    found = {"rope_parameters": _rope_of(given)}
    if "num_key_value_heads" in given and given["num_key_value_heads"] is None:
        found["num_key_value_heads"] = given.get("num_attention_heads", TextConfig.num_attention_heads)
    return found


def _rope_of(given: dict) -> dict:
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"the backbone's positions are {rope!r}: every layer has the same, as one object")
    theta = rope.get("rope_theta", given.get("rope_theta", _DEFAULT_ROPE_THETA))
    if type(theta) not in (int, float):
        raise InputError(f"text_config.rope_theta is {theta!r}: it must be a number")
    return {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default")), "rope_theta": theta}


_JSON_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "an object"}


def _typed(name: str, value, like):
    """``value`` if it has the type of ``like``. Raises InputError where it has not."""
    if isinstance(like, tuple):
        if isinstance(value, list):
            return tuple(_typed(name, each, like[0]) for each in value)
        raise InputError(f"{name} is {value!r}: it must be an array")
    if isinstance(like, float) and type(value) is int:
        return float(value)
    if type(value) is not type(like):
        raise InputError(f"{name} is {value!r}: it must be {_JSON_NAMES[type(like)]}")
    return value
