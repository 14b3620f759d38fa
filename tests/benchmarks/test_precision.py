"""Stages in bfloat16 and float16 on a CPU, as a GPU would compute them, against float32."""

import gc
import itertools
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import wire
from harness.errors import InputError
from harness.vibevoice.stages.backbone import Backbone
from harness.vibevoice.stages.configuration import preset_config
from harness.vibevoice.stages.diffusion import DiffusionStage, solver_updates
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.towers import _product
from harness.vibevoice.stages.vocoder import VocoderStage

HALF = ("bfloat16", "float16")
# Heads as wide as those of 1.5b, so that positions turn as many frequencies, in few of them.
SIZES = {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "wide-heads.json"
    path.write_text(json.dumps(SIZES))
    return str(path)


@pytest.mark.parametrize("name", ["tiny", "1.5b", "7b"])
@pytest.mark.parametrize("dtype", HALF)
def test_frequencies_of_positions_are_those_of_float32(name, dtype):
    text = preset_config(name).text_config
    size = text.hidden_size // text.num_attention_heads
    # Su et al., RoFormer, arXiv 2104.09864, section 3.4.2, with the base of Qwen2.
    expected = torch.tensor([1_000_000.0 ** (-2 * i / size) for i in range(size // 2)])
    model = Weights("tiny", dtype=dtype)
    one_head = replace(model.config.text_config, hidden_size=size, num_attention_heads=1, num_key_value_heads=1)
    model.config = replace(model.config, text_config=one_head)
    torch.testing.assert_close(Backbone(model.backbone()).frequencies, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_timesteps_are_embedded_as_in_float32(dtype):
    timesteps, _ = solver_updates(wire.DEFAULT_DIFFUSION_STEPS)
    half, full = DiffusionStage(Weights(dtype=dtype)).head, DiffusionStage(Weights(plain=True)).head
    given = torch.tensor(timesteps)
    torch.testing.assert_close(half.head.timestep_embedding(given), full.head.timestep_embedding(given))
    error = (half.times_of(timesteps).float() - full.times_of(timesteps)).norm() / full.times_of(timesteps).norm()
    assert error < 0.01


def conditions(preset, dtype, position, rounded=False):
    """Those [frames, 2, hidden] of some frames after a prompt of so many tokens; the same inputs for every dtype."""
    torch.set_num_threads(1)
    stage, generator = LLMStage(Weights(preset, dtype=dtype, plain=True)), torch.Generator().manual_seed(0)
    if rounded:
        stage.backbone.frequencies = stage.backbone.frequencies.bfloat16().float()
    stage.open(1, position, 8)
    stage.prefill(1, torch.randint(0, 4000, (position,), generator=generator), torch.empty(0, wire.LATENT_SIZE))
    draw = lambda size: torch.randn(1, size, generator=generator)  # noqa: E731
    steps = (stage.step([1], draw(wire.LATENT_SIZE), draw(wire.SEMANTIC_SIZE)) for _ in range(8))
    return torch.cat([condition for condition, _ in steps])


def off(values, reference):
    return float((values - reference).norm() / reference.norm())


@pytest.mark.parametrize("position", [1_500, 8_000])
def test_conditions_in_bfloat16_stay_near_late_in_a_session(preset, position):
    reference = conditions(preset, "float32", position)
    error = off(conditions(preset, "bfloat16", position), reference)
    assert 0 < error < 0.02
    if position == 8_000:  # the bound finds frequencies that were rounded
        assert off(conditions(preset, "bfloat16", position, rounded=True), reference) > 0.02


def test_conditions_in_float16_are_within_1_percent(preset):
    reference = conditions(preset, "float32", 400)
    assert 0 < off(conditions(preset, "float16", 400), reference) < 0.01


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.01), ("float16", 0.002)])
def test_a_latent_is_as_near_as_one_pass_of_the_head_allows(dtype, most):
    generator = torch.Generator().manual_seed(1)
    condition, noise = torch.randn(4, 2, 64, generator=generator), torch.randn(4, 64, generator=generator)
    guidance, steps = torch.full((4, 1), 1.3), [10] * 4
    latents = [
        DiffusionStage(Weights(plain=True, dtype=d)).denoise(condition, noise, guidance, steps)
        for d in (dtype, "float32")
    ]
    assert latents[0].dtype == torch.float32 and 0 < off(*latents) < most


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.04), ("float16", 0.01)])
def test_audio_is_as_near_over_frames_that_share_a_state(dtype, most):
    generator = torch.Generator().manual_seed(2)
    stages = [VocoderStage(Weights(plain=True, dtype=d)) for d in (dtype, "float32")]
    for stage in stages:
        stage.open(1)
    for _ in range(6):
        latent = torch.randn(1, 64, generator=generator)
        token = torch.tensor([wire.TOKEN_SPEECH_FRAME])
        (audio, features), (true_audio, true_features) = (stage.step([1], latent, token) for stage in stages)
        assert 0 < off(audio, true_audio) < most and 0 < off(features, true_features) < 2 * most
    assert stages[0].close(1).dtype == torch.float32


def test_constants_are_folded_in_float32_and_rounded_once():
    factors = [torch.rand(1000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    exact = factors[0].double() * factors[1].double() * factors[2].double()
    assert torch.equal(_product(*factors), exact.float().bfloat16())
    assert not torch.equal(factors[0] * factors[1] * factors[2], exact.float().bfloat16())


def test_only_float32_on_a_cpu_is_compiled_and_types_without_a_name_are_refused():
    assert LLMStage(Weights(dtype="bfloat16")).compiled is None
    with pytest.raises(InputError, match="unknown dtype 'float8': use auto, float32, bfloat16, float16"):
        Weights(dtype="float8")
    assert Weights(device="meta").dtype == torch.bfloat16 and Weights().dtype == torch.float32
    assert LLMStage(Weights(dtype="float16")).kv_bytes_per_token == 256


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "model"))
    import precision

    return precision


def test_a_position_is_compared_in_every_dtype_before_a_longer_one_and_each_line_says_the_seconds(script, capsys):
    seconds = itertools.count()
    make = lambda dtype: Weights(dtype=dtype, plain=True)  # noqa: E731
    found = list(script.compare(make, HALF, [20, 8], 2, 0, together=True, clock=lambda: next(seconds)))
    assert [(each["position"], each["dtype"]) for each in found] == [(8, d) for d in HALF] + [(20, d) for d in HALF]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[  1 s] float32: position 8 spoken" and lines[-1] == "[  6 s] float16: position 20 compared"


@pytest.mark.parametrize("together", [True, False])
def test_models_that_do_not_fit_together_are_in_memory_one_at_a_time(script, monkeypatch, together):
    alive, most, built = weakref.WeakSet(), [], []

    def make(dtype):
        gc.collect()
        most.append(len(alive))
        built.append(dtype)
        return Weights(dtype=dtype, plain=True)

    real = script._speaker

    def speaker(weights, positions):
        made = real(weights, positions)
        alive.add(made)
        return made

    monkeypatch.setattr(script, "_speaker", speaker)
    findings = list(script.compare(make, HALF, [8, 20], 2, 0, together=together))
    assert len(findings) == 4
    assert built == (["float32", *HALF] if together else ["float32", *HALF] * 2)
    assert max(most) == (2 if together else 0)


def test_three_models_of_1_5b_fit_an_80_gb_gpu_and_those_of_7b_do_not(script):
    sizes = {preset: script.fit_together(preset, "", ["bfloat16", "float16"], 79 << 30) for preset in ("1.5b", "7b")}
    assert sizes == {"1.5b": True, "7b": False}
    assert not script.fit_together("tiny", "some/folder", ["bfloat16"], 79 << 30)
