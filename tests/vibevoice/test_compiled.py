"""The compiled networks against the plain ones, over shapes whose edges fall everywhere; both are kept."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from harness import wire
from harness.vibevoice.compiled import products
from harness.vibevoice.compiled.lanes import load, store
from harness.vibevoice.compiled.pack import Pack
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import COMPILED_HIDDEN_SIZE, Weights
from harness.vibevoice.stages.vocoder import VocoderStage

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "tiny": {},
    "odd": {"num_filters": 3, "depths": [2, 1, 1, 1, 1, 1, 2], "head_layers": 3, "head_intermediate_size": 50},
    "one KV head": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 100},
}


@pytest.fixture(scope="module", params=SHAPES)
def both(request, tmp_path_factory):
    """Weights of one shape, for the plain and for the compiled networks."""
    sizes = tmp_path_factory.mktemp("sizes") / "own.json"
    sizes.write_text(json.dumps(SHAPES[request.param]))
    torch.set_num_threads(1)
    return Weights(str(sizes), seed=3, plain=True), Weights(str(sizes), seed=3)


@pytest.fixture(autouse=True)
def the_same_numbers_in_every_run():
    torch.manual_seed(0)


def close(ours, plain, atol=2e-5):
    torch.testing.assert_close(ours, plain, atol=atol, rtol=1e-4)


def test_the_vocoder_speaks_as_the_plain_one_and_keeps_the_same_state(both):
    stages = [VocoderStage(weights) for weights in both]
    assert all(stages[1].compiled) and not any(stages[0].compiled)
    for batch in ([1], [1, 2, 3], list(range(1, 18))):  # sessions join others that have spoken
        for stage in stages:
            for session in batch:
                if session not in stage.sessions._states:
                    stage.open(session)
        latent, token = torch.randn(len(batch), 64), torch.full((len(batch),), wire.TOKEN_SPEECH_FRAME)
        (plain_audio, plain_features), (audio, features) = (stage.step(batch, latent, token) for stage in stages)
        close(audio, plain_audio, 5e-5)
        close(features, plain_features)
    for session in (1, 3, 17):
        plain_state, state = (stage.close(session) for stage in stages)
        close(state, plain_state, 5e-5)


@pytest.mark.parametrize("count", [1, 8])
def test_an_answer_outlives_the_next_call(both, count):
    vocoder, diffusion, ids = VocoderStage(both[1]), DiffusionStage(both[1]), list(range(count))
    for session in ids:
        vocoder.open(session)
    token = torch.full((count,), wire.TOKEN_SPEECH_FRAME)

    def answers():
        condition = torch.randn(count, 2, both[1].config.text_config.hidden_size)
        latent = diffusion.denoise(condition, torch.randn(count, 64), torch.ones(count, 1), [2] * count)
        return latent, *vocoder.step(ids, latent, token)

    first = answers()
    kept = [answer.clone() for answer in first]
    answers()
    assert all(torch.equal(answer, copy) for answer, copy in zip(first, kept, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 8, 13, 16])
def test_the_diffusion_head_denoises_as_the_plain_one(both, rows):
    plain, compiled = (DiffusionStage(weights) for weights in both)
    assert compiled.compiled and not plain.compiled
    condition = torch.randn(rows, 2, both[0].config.text_config.hidden_size)
    noise, guidance = torch.randn(rows, 64), 3 * torch.rand(rows, 1)
    steps = [(1, 2, 10)[i % 3] for i in range(rows)]
    arguments = condition, noise, guidance, steps
    close(compiled.denoise(*arguments), plain.denoise(*arguments))


def test_the_backbone_steps_as_the_plain_one_with_contexts_of_every_length(both):
    stages = [LLMStage(weights) for weights in both]
    assert stages[1].compiled and not stages[0].compiled
    ids = list(range(11))
    for stage in stages:
        for session in ids:
            stage.open(session, 1 + session**3 // 3, frames=6)
            stage.prefill(session, torch.arange(1 + session**3 // 3) % 4000, torch.empty(0, 64))
    for batch in (ids[:1], ids[3:6], ids, ids[::-1]):
        latent, semantic = torch.randn(len(batch), 64), torch.randn(len(batch), 128)
        (plain, _), (condition, _) = (stage.step(batch, latent, semantic) for stage in stages)
        close(condition, plain)
    for session in ids:
        plain, compiled = (stage.sessions.get(session).with_prompt for stage in stages)
        close(compiled.kv[:, :, :, : compiled.length], plain.kv[:, :, :, : plain.length])


@pytest.mark.parametrize("sizes", [{"hidden_size": 2 * COMPILED_HIDDEN_SIZE}, {"num_attention_heads": 16}])
def test_a_large_model_and_heads_that_fill_no_vector_stay_plain(tmp_path, sizes):
    (tmp_path / "own.json").write_text(json.dumps(sizes))
    assert LLMStage(Weights(str(tmp_path / "own.json"))).compiled is None


DENOISE = """
import torch
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.presets import Weights
stage = DiffusionStage(Weights("tiny"))
print(bool(stage.compiled), stage.denoise(torch.zeros(1, 2, 64), torch.ones(1, 64), torch.ones(1, 1), [2]).sum().item())
"""


def denoised(folder, **environment):
    """What a process says in the harness of a folder: whether its network is compiled, and what comes out of it."""
    command = [sys.executable, "-c", DENOISE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=True)
    *said, last = done.stdout.splitlines()
    compiled, total = last.split()
    return " ".join(said), compiled == "True", float(total)


def test_a_damaged_cache_is_done_without_and_where_nothing_compiles_the_network_stays_plain(tmp_path):
    shutil.copytree(ROOT / "harness", tmp_path / "harness")  # with what is compiled already, for that takes long
    said, compiled, total = denoised(tmp_path)
    files = list((tmp_path / "harness" / "vibevoice").rglob("*.nbi"))
    assert compiled and files and not said
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    said, compiled, again = denoised(tmp_path, NUMBA_OPT="0")  # optimising takes long too
    assert compiled and again == total and f"compiled again: delete the unusable cache {tmp_path}" in said
    said, compiled, plain = denoised(tmp_path, NUMBA_DISABLE_JIT="1")
    assert not compiled and plain == pytest.approx(total, rel=1e-4) and "is not compiled" in said


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 13),
    channels=st.integers(1, 9),
    taps=st.integers(1, 3),
    columns=st.integers(1, 60),
    added=st.booleans(),
)
def test_a_product_is_the_matrix_product(rows, channels, taps, columns, added):
    rng, ld = np.random.default_rng(rows), -(-(columns + 2) // 8) * 8 + 8
    weight, bias = rng.normal(size=(rows, taps * channels)), rng.normal(size=rows)
    pack = Pack()
    at = pack.matrix(torch.tensor(weight)), pack.add(torch.tensor(bias))
    x, y = rng.normal(size=(channels, ld)).astype(np.float32), rng.normal(size=(rows, ld)).astype(np.float32)
    windows = np.concatenate([x[:, tap : tap + columns] for tap in range(taps)])
    expected = bias[:, None] + weight @ windows + (y[:, :columns] if added else 0)
    source = np.append(x.ravel(), np.zeros(16, np.float32))
    answer = y.ravel()
    products.product(pack.array(), *at, rows, source, 0, ld, channels, taps, 1, answer, 0, ld, columns, added)
    np.testing.assert_allclose(answer.reshape(rows, ld)[:, :columns], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "exact", "least", "most"),
    [
        (products.gelu, lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))), -30.0, 30.0),
        (products.silu, lambda x: x / (1 + math.exp(-x)), -80.0, 80.0),
        (products.exponential, math.exp, -86.0, 86.0),
    ],
)
def test_activations_are_as_exact_as_float32(function, exact, least, most):
    @njit
    def apply(x):
        for i in range(0, len(x), 8):
            store(x, i, function(load(x, i)))

    x = np.concatenate([np.linspace(least, most, 4000), np.linspace(max(least, -8), min(most, 8), 4000)])
    x = x.astype(np.float32)
    answer = x.copy()
    apply(answer)
    np.testing.assert_allclose(answer, [exact(float(one)) for one in x], atol=2e-6, rtol=1e-6)


def test_a_session_speaks_the_same_to_the_bit_whoever_is_stepped_with_it(both):
    llm = LLMStage(both[1])
    latent, semantic = torch.randn(30, wire.LATENT_SIZE), torch.randn(30, wire.SEMANTIC_SIZE)
    said = []
    for beside in (0, 1, 3, 7, 8, 22):
        sessions = list(range(1 + beside))
        for session in sessions:
            llm.open(session, 12 + session, 4)
            llm.prefill(session, torch.arange(5, 17 + session), torch.zeros(0, wire.LATENT_SIZE))
        said.append(
            torch.stack([llm.step(sessions, latent[: 1 + beside], semantic[: 1 + beside])[0][0] for _ in "123"])
        )
        for session in sessions:
            llm.close(session)
    assert all(torch.equal(each, said[0]) for each in said[1:])
