"""Values of the row-wise kernels for GPUs: by Triton's interpreter on a CPU, compiled where there is a GPU.

Needs the package ``triton``.
"""

import numpy as np
import pytest
import torch
from conftest import HAS_GPU
from torch.nn import functional

from harness import wire
from harness.vibevoice.kernels import plain_rows
from harness.vibevoice.kernels.rows import rows_on
from harness.vibevoice.stages.diffusion import DiffusionStage, solver_updates
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
INTERPRETED = "TRITON_INTERPRET", "" if HAS_GPU else "1"
with pytest.MonkeyPatch.context() as patch:
    patch.setenv(*INTERPRETED)
    from harness.vibevoice.kernels import fused_rows

DTYPES = torch.float32, torch.float16, torch.bfloat16
EPSILON = 1e-6
WIDTHS = [1, 64, 70, 1536, 3584]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv(*INTERPRETED)
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        """The interpreter (of Triton 3.7) cuts float32 off where compiled kernels round to bfloat16."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def draw():
    """``draw(*sizes, dtype=…)``: random numbers, the same in every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *sizes, dtype=torch.float32: torch.randn(*sizes, generator=generator).to(DEVICE, dtype)


def near(found, exact, size=1.0):
    """Off by one rounding of its type and by float32's error, which grows with the ``size`` of the terms."""
    half_a_step = torch.finfo(found.dtype).eps / 2 if found.dtype != torch.float32 else 0
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-6 + 1.01 * half_a_step, atol=1e-6 * float(size))


def apart(found, reference):
    return float((found.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_sum_is_normed_as_torch_norms_it(width, dtype, draw):
    x, delta, weight = draw(3, width, dtype=dtype), draw(3, width, dtype=dtype), draw(width, dtype=dtype)
    total, normed = fused_rows.add_norm(x, delta, weight, EPSILON)
    assert torch.equal(total, x + delta) and normed.dtype == dtype
    near(normed, functional.rms_norm(total.double(), (width,), weight.double(), EPSILON))
    if dtype == torch.float32:
        assert apart(normed, plain_rows.add_norm(x, delta, weight, EPSILON)[1]) < 1e-6


def test_the_first_norm_has_nothing_to_add(draw):
    x, weight = draw(3, 64), draw(64)
    total, normed = fused_rows.add_norm(x, None, weight, EPSILON)
    assert total is x
    near(normed, functional.rms_norm(x, (64,), weight, EPSILON))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "others", "size"), [(6, 2, 16), (14, 2, 128), (32, 4, 128), (1, 1, 2), (5, 1, 24), (3, 1, 256)]
)
def test_heads_are_rotated_in_place_and_values_are_left(heads, others, size, dtype, draw):
    made = draw(4, heads + others, size, dtype=dtype)
    before = made.clone()
    facts = torch.tensor([[7, 9, position] for position in (0, 1, 1_500, 106_000)], device=DEVICE)
    frequencies = 1_000_000.0 ** (-torch.arange(0, size, 2, device=DEVICE) / size)
    positions = facts[:, 2]  # as a step has them: not side by side
    turned = fused_rows.turn(made, fused_rows.angles(positions, frequencies, dtype), heads)
    angles = torch.outer(positions.float(), frequencies)[:, None]
    cos, sin = angles.double().cos().to(dtype).double(), angles.double().sin().to(dtype).double()
    first, second = before[:, :heads].double().chunk(2, -1)
    exact = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    size_of_terms = 5 if dtype == torch.float32 else 3e6 * torch.finfo(dtype).eps  # a cosine may round the other way
    near(turned, exact, size_of_terms)
    assert turned.data_ptr() == made.data_ptr() and torch.equal(made[:, heads:], before[:, heads:])
    if dtype == torch.float32:
        plain = plain_rows.turn(before, plain_rows.angles(positions, frequencies, dtype), heads)
        assert apart(turned, plain) < 1e-6


def test_rotated_heads_are_attended_to_without_a_copy(draw):
    from harness.vibevoice.kernels.ragged import _aligned_rows

    made = draw(3, 16, 128, dtype=torch.bfloat16)
    angles = fused_rows.angles(torch.arange(3, device=DEVICE), torch.ones(64, device=DEVICE), torch.bfloat16)
    for part in (*fused_rows.turn(made, angles, 14).split((12, 2), 1), made[:, 14:]):
        assert _aligned_rows(part) is part
    with pytest.raises(ValueError, match="not contiguous"):
        fused_rows.turn(made[:, :15], angles, 14)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter's numpy, as it must
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [1, 192, 257, 1024, 4608, 8960])
def test_a_gate_is_a_silu_times_the_other_half(wide, dtype, draw):
    both = draw(3, 2 * wide, dtype=dtype) * 3
    both[0, 0], both[1, 0] = 80, -200  # where an exponential overflows
    gated = fused_rows.gate(both, functional.silu)
    inner, up = both.double().chunk(2, -1)
    near(gated, inner * inner.sigmoid() * up)
    if dtype == torch.float32:
        assert apart(gated, plain_rows.gate(both, functional.silu)) < 1e-6


def test_another_activation_stays_as_it_is(draw):
    both = draw(3, 128)
    assert torch.equal(fused_rows.gate(both, functional.gelu), plain_rows.gate(both, functional.gelu))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("place", ["first", "repeated", "middle", "last"])
def test_a_gated_sum_is_normed_and_modulated(place, hidden, dtype, draw):
    rows = 6
    parts = draw(rows, 3, hidden, dtype=dtype)
    shift, scale, gating = parts.unbind(1)
    x = draw(rows // 2 if place in ("first", "repeated") else rows, hidden, dtype=dtype)
    delta = None if place == "first" else draw(rows, hidden, dtype=dtype)
    weight = None if place == "last" else draw(hidden, dtype=dtype)
    given = x, None if delta is None else gating, delta, weight, EPSILON, shift, scale
    total, modulated = fused_rows.modulate(*given)
    every = x.repeat(rows // len(x), 1)
    if delta is not None:
        near(total, every.double() + gating.double() * delta.double(), 10)
        every = total
    factor = None if weight is None else weight.double()
    normed = functional.rms_norm(every.double(), (hidden,), factor, EPSILON)
    near(modulated, shift.double() + normed * scale.double(), 10)
    if dtype == torch.float32:
        assert apart(modulated, plain_rows.modulate(*given)[1]) < 1e-6


def test_modulations_that_lie_apart_in_different_ways_are_refused(draw):
    with pytest.raises(ValueError, match="different strides"):
        fused_rows.modulate(draw(4, 8), None, None, draw(8), EPSILON, draw(4, 8), draw(4, 2, 8)[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [wire.LATENT_SIZE, 5])
def test_a_step_of_the_solver_is_that_of_torch(size, dtype, draw):
    rows, (_, updates) = 5, solver_updates(4)
    guidance = torch.tensor([[0.0], [0.3], [0.5], [1.0], [1.7]], device=DEVICE)  # around the edge of a lerp
    x, before = draw(rows, size), None
    for update in updates:
        velocity = draw(2 * rows, size, dtype=dtype)
        expected = plain_rows.solve(x, velocity, guidance, before, update, dtype)
        x, before, rounded = fused_rows.solve(x, velocity, guidance, before, update, dtype)
        for found, exact in zip((x, before), expected, strict=False):
            near(found, exact, 3)
        assert torch.equal(rounded, x.to(dtype))


# Networks as a whole


def conditions(weights, rows, sessions=3):
    stage, generator = LLMStage(weights), torch.Generator().manual_seed(0)
    stage.backbone.rows = rows
    for session in range(sessions):
        stage.open(session, 20 + session, 8)
        ids = torch.randint(0, 4000, (20 + session,), generator=generator)
        stage.prefill(session, ids, torch.empty(0, wire.LATENT_SIZE))
    draw = lambda size: torch.randn(sessions, size, generator=generator)  # noqa: E731
    steps = (stage.step(list(range(sessions)), draw(wire.LATENT_SIZE), draw(wire.SEMANTIC_SIZE)) for _ in range(3))
    return torch.cat([condition for condition, _ in steps])


def latents(weights, rows, sessions=3):
    stage, generator = DiffusionStage(weights), torch.Generator().manual_seed(0)
    stage.head.rows = rows
    condition = torch.randn(sessions, 2, stage.head.conditions, generator=generator)
    noise = torch.randn(sessions, wire.LATENT_SIZE, generator=generator)
    return stage.denoise(condition, noise, torch.tensor([[1.3], [0.2], [2.0]]), [4, 4, 4])


@pytest.mark.parametrize("network", [conditions, latents])
def test_a_network_answers_as_without_the_kernels(network):
    weights = Weights("tiny", device=DEVICE.type, dtype="float32", plain=True)
    assert apart(network(weights, fused_rows), network(weights, plain_rows)) < 1e-5


@pytest.mark.parametrize("network", [conditions, latents])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_network_in_16_bits_is_as_near_to_float32_as_without_the_kernels(network, dtype):
    exact = network(Weights("tiny", device=DEVICE.type, drawn_on="cpu", dtype="float32", plain=True), plain_rows)
    weights = Weights("tiny", device=DEVICE.type, drawn_on="cpu", dtype=dtype, plain=True)
    fused, plain = (apart(network(weights, rows), exact) for rows in (fused_rows, plain_rows))
    assert 0 < fused < 1.3 * plain  # roundings differ, by chance either way


def test_networks_take_the_kernels_on_a_gpu_only():
    assert rows_on(torch.device("cuda", 1)) is fused_rows
    assert rows_on(torch.device("cpu")) is rows_on(torch.device("meta")) is plain_rows
