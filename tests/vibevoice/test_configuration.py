"""Our configuration is transformers': of presets, sizes of one's own, checkpoints, and in every default."""

import json
import subprocess
import sys
from dataclasses import MISSING, asdict, fields

import pytest
import transformers
from packaging.version import Version
from transformers import (
    Qwen2Config,
    VibeVoiceAcousticTokenizerConfig,
    VibeVoiceAcousticTokenizerEncoderConfig,
    VibeVoiceConfig,
)
from transformers.models.vibevoice.configuration_vibevoice import VibeVoiceDiffusionHeadConfig

from harness.errors import InputError
from harness.vibevoice.stages.configuration import (
    HeadConfig,
    ModelConfig,
    TextConfig,
    TowerConfig,
    checkpoint_config,
    config_of,
    preset_config,
)
from harness.vibevoice.stages.released import released_config

PARTS = ("text_config", "diffusion_head_config", "audio_config", "semantic_model_config")
OWN = {"base": "1.5b", "num_filters": 5, "depths": [1, 2, 3, 4, 3, 2, 1], "head_layers": 3, "num_key_value_heads": 4}
FOUND_IN_CONFIGS = [
    {},
    {"text_config": {"rope_theta": 5e5}},
    {"text_config": {"rope_theta": 5e5, "rope_scaling": None}},
    {"text_config": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}},
    {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rope_theta": 1.0}},
    {"text_config": {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": None, "use_cache": False}},
    {"audio_config": {"hidden_size": 32, "downsampling_ratios": [8, 4], "depths": [1, 2, 3], "rms_norm_eps": 1e-3}},
    {"semantic_model_config": {}, "audio_config": None},
    {"semantic_model_config": {"depths": [1, 2, 3, 4, 5, 6, 7]}, "audio_token_id": 5, "dtype": "bfloat16"},
]
# The diffusion head's sizes are its neighbours': versions before 5.23 leave that to whoever writes config.json.
DERIVED = ("hidden_size", "latent_size") if Version(transformers.__version__) < Version("5.23") else ()
if not DERIVED:
    FOUND_IN_CONFIGS.append(
        {"text_config": {"hidden_size": 256}, "diffusion_head_config": {"hidden_size": 128, "latent_size": 3}}
    )


def plain(value):
    return tuple(value) if isinstance(value, list) else value


def assert_equal(ours, released):
    """Every field that we have is theirs, those of the towers' two halves among them."""
    pairs = [(getattr(ours, part), getattr(released, part)) for part in PARTS]
    for half in ("encoder_config", "decoder_config"):
        pairs.append((getattr(ours.audio_config, half), getattr(released.audio_config, half)))
    assert ours.audio_config.decoder_config.upsampling_ratios == plain(pairs[-1][1].upsampling_ratios)
    for mine, theirs in [(ours, released), *pairs]:
        derived = DERIVED if isinstance(mine, HeadConfig) else ()
        names = [each.name for each in fields(mine) if each.name not in (*PARTS, *derived)]
        assert {name: getattr(mine, name) for name in names} == {name: plain(getattr(theirs, name)) for name in names}


@pytest.mark.parametrize("preset", ["tiny", "1.5b", "7b", "own"])
def test_a_preset_saved_as_a_checkpoint_reads_as_itself(tmp_path, preset):
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    ours = preset_config(str(tmp_path / "own.json") if preset == "own" else preset)
    released_config(ours).save_pretrained(tmp_path)
    assert_equal(ours, released_config(ours))
    assert config_of("7b", str(tmp_path)) == ours
    assert_equal(ours, VibeVoiceConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("held", FOUND_IN_CONFIGS, ids=json.dumps)
def test_a_checkpoint_reads_as_transformers_reads_it(tmp_path, held):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vibevoice", **held}))
    assert_equal(checkpoint_config(tmp_path), VibeVoiceConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (TextConfig, Qwen2Config),
        (HeadConfig, VibeVoiceDiffusionHeadConfig),
        (TowerConfig, VibeVoiceAcousticTokenizerConfig),
        (TowerConfig, VibeVoiceAcousticTokenizerEncoderConfig),
        (ModelConfig, VibeVoiceConfig),
    ],
)
def test_defaults_are_transformers_own(ours, theirs):
    defaults = {each.name: each.default for each in fields(ours) if each.name not in (*PARTS, "rope_parameters")}
    assert MISSING not in defaults.values()
    assert defaults == {name: plain(getattr(theirs(), name)) for name in defaults}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"text_config": []}, "text_config is .*: it must be an object"),
        ({"text_config": {"hidden_size": "64"}}, "text_config.hidden_size is '64': it must be an integer"),
        ({"text_config": {"num_hidden_layers": True}}, "num_hidden_layers is True: it must be an integer"),
        ({"text_config": {"rms_norm_eps": None}}, "rms_norm_eps is None: it must be a number"),
        ({"text_config": {"rope_theta": "1e6"}}, "rope_theta is '1e6': it must be a number"),
        ({"text_config": {"rope_parameters": "default"}}, "positions are 'default'"),
        ({"text_config": {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}}, "every layer has the same"),
        ({"audio_config": {"depths": 7}}, "audio_config.depths is 7: it must be an array"),
        ({"audio_config": {"depths": [1, "2"]}}, "audio_config.depths is '2': it must be an integer"),
        ({"diffusion_head_config": {"hidden_act": 1}}, "hidden_act is 1: it must be a string"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]: it must be an integer"),
    ],
)
def test_values_of_another_type_are_refused_by_name(tmp_path, held, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vibevoice", **held}))
    with pytest.raises(InputError, match=f"config.json of checkpoint {tmp_path} cannot be used: .*{message}"):
        checkpoint_config(tmp_path)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("stages.configuration", ("torch", "transformers")),
        ("entry.prompt, entry.tokenizer, entry.voices", ("torch", "transformers")),
        ("stages.llm, stages.diffusion, stages.vocoder, stages.voice_encoder", ("transformers",)),
    ],
)
def test_a_process_loads_no_package_that_it_does_not_need(modules, absent):
    named = ", ".join(f"harness.vibevoice.{module}" for module in modules.split(", "))
    look = f"import sys, {named}; print(sorted(set(sys.modules) & set({absent!r})))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_a_configuration_is_compared_by_its_values():
    assert preset_config("tiny") == preset_config("tiny") != preset_config("1.5b")
    assert asdict(preset_config("tiny"))["diffusion_head_config"]["hidden_size"] == 64
