"""The towers' kernels for GPUs: by Triton's interpreter on a CPU, compiled where there is a GPU.

Needs the package ``triton``.
"""

import json

import pytest
import torch
from conftest import HAS_GPU
from interpreter import widen_products, widen_tiles
from torch.nn import functional

from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.towers import Tower

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
INTERPRETED = "TRITON_INTERPRET", "" if HAS_GPU else "1"
with pytest.MonkeyPatch.context() as patch:
    patch.setenv(*INTERPRETED)
    import triton
    from triton import language as tl

    from harness.vibevoice.stages import fused_towers
    from harness.vibevoice.stages.fused_towers import FusedTower

    @triton.jit
    def _activate(x, y, activation: tl.constexpr, size: tl.constexpr):
        at = tl.arange(0, size)
        tl.store(y + at, fused_towers._activated(tl.load(x + at), activation))


TOLERANCE = 1e-4  # of the largest value, in float32
ODD = {"num_filters": 3, "depths": [1, 2, 1, 1, 1, 1, 1]}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv(*INTERPRETED)
    widen_products(monkeypatch)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Larger ones, for the interpreter takes a program's time and not a value's; still several of each stage."""
    if HAS_GPU:
        return
    for room in fused_towers.BLOCK_TILES:
        monkeypatch.setitem(fused_towers.BLOCK_TILES, room, (1024 if room == 16 else 64, 64, 4, 2, 7))
    widen_tiles(monkeypatch)


@pytest.fixture(params=["one kernel", "products"])
def kind(request, monkeypatch):
    """All blocks, of any type, as one kernel or as products."""
    most = 256 if request.param == "one kernel" else 0
    monkeypatch.setattr(fused_towers, "FUSED_CHANNELS", dict.fromkeys(fused_towers.FUSED_CHANNELS, most))


@pytest.fixture
def odd(tmp_path):
    """A preset whose channels are no powers of two."""
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(ODD))
    return str(file)


def towers(preset, dtype):
    weights = Weights(preset, device=str(DEVICE), dtype=str(dtype).removeprefix("torch."), plain=True)
    return Tower(weights.acoustic_decoder()), Tower(weights.semantic_encoder())


def draw(*sizes, dtype=torch.float32, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check_steps(preset, sessions, steps):
    """Both towers from states of noise, step by step: the plain ones' values and states, in any rows of the table."""
    decoder, encoder = towers(preset, torch.float32)
    before, after = 5, 7  # columns of the table that belong to others
    fused = FusedTower(decoder, before), FusedTower(encoder, before + decoder.state_size)
    assert [tower.state_size for tower in fused] == [decoder.state_size, encoder.state_size]
    total = before + decoder.state_size + encoder.state_size + after
    table = draw(2 * sessions + 3, total)
    mine = slice(before, total - after)
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    read, write = rows[:sessions], rows[sessions : 2 * sessions]
    state = table[read, mine].t().contiguous()
    for step in range(steps):
        untouched, latent = table.clone(), draw(sessions, 1, 64, seed=step)
        parts = state.split([decoder.state_size, encoder.state_size])
        expected, decoded = decoder(latent.permute(2, 1, 0).contiguous(), parts[0])
        features, encoded = encoder(expected, parts[1])
        state = torch.cat([decoded, encoded])
        audio = fused[0](latent, table, read, write)
        same(audio, expected.permute(2, 1, 0))
        same(fused[1](expected.permute(2, 1, 0).contiguous(), table, read, write), features.permute(2, 1, 0))
        same(table[write, mine], state.t())
        untouched[write, mine] = table[write, mine]
        assert torch.equal(table, untouched)
        table[write, mine] = state.t()  # or differences would add up
        read, write = write, read


def same(ours, plain):
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    scale = plain.abs().max()
    torch.testing.assert_close(ours / scale, plain / scale, atol=TOLERANCE, rtol=0)


def test_every_step_is_that_of_the_plain_towers(kind):
    check_steps("tiny", 2, 1 if fused_towers.FUSED_CHANNELS[torch.float32] else 2)


def test_a_session_by_itself():
    check_steps("tiny", 1, 1)


def test_channels_need_not_be_powers_of_two(kind, odd):
    check_steps(odd, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_as_close_to_float32_as_those_of_the_plain_tower(kind, dtype):
    decoder, _ = towers("tiny", dtype)
    exact, _ = towers("tiny", torch.float32)
    latent, table = draw(1, 1, 64, dtype=dtype), draw(2, decoder.state_size, dtype=dtype)
    given, state = latent.permute(2, 1, 0).contiguous(), table[:1].t().contiguous()
    expected, after = exact(given.float(), state.float())
    plain, plain_after = decoder(given, state)
    rows = torch.tensor([0], device=DEVICE), torch.tensor([1], device=DEVICE)
    audio = FusedTower(decoder)(latent, table, *rows)
    assert audio.dtype == dtype
    off = lambda ours, exact: (ours.float().flatten() - exact.flatten()).square().mean().sqrt()  # noqa: E731
    assert 0 < off(audio, expected) < 2 * off(plain, expected)
    assert 0 < off(table[1], after) < 2 * off(plain_after, after)


def test_sessions_may_share_a_row_that_nobody_reads():
    """As those that fill a batch up do: the others' values are what they are without them."""
    decoder, _ = towers("tiny", torch.float32)
    fused, table = FusedTower(decoder), draw(6, decoder.state_size)
    alone, latent = table.clone(), draw(4, 1, 64)
    read, write = torch.tensor([0, 1, 5, 5], device=DEVICE), torch.tensor([2, 3, 4, 4], device=DEVICE)
    expected = fused(latent[:2], alone, read[:2], write[:2])
    audio = fused(latent, table, read, write)
    same(audio[:2], expected)
    same(table[2:4], alone[2:4])
    assert torch.equal(table[[0, 1, 5]], alone[[0, 1, 5]])


@pytest.mark.parametrize(
    ("name", "exact", "tolerance"),
    [
        ("_GELU", functional.gelu, 2e-6),
        ("_SILU", functional.silu, 2e-6),
        ("_POLYNOMIAL_GELU", functional.gelu, 6e-5),
    ],
)
def test_activations_are_torchs(name, exact, tolerance):
    size = 1 << 12
    x = torch.cat([torch.linspace(-8, 8, size - 4), torch.tensor([-1e4, -100.0, 100.0, 1e4])]).to(DEVICE)
    y = torch.empty_like(x)
    _activate[(1,)](x, y, getattr(fused_towers, name), size)
    scale = x.abs().clamp(min=8) / 8  # beyond the ends, what is left of a half is as small as float32 has it
    assert ((y - exact(x)).abs() / scale).max() < tolerance


def test_a_layer_or_an_activation_that_the_kernels_do_not_know_is_refused(monkeypatch):
    decoder, _ = towers("tiny", torch.bfloat16)
    decoder.layers[1].activation = torch.tanh
    with pytest.raises(NotImplementedError, match="no kernel for the activation .*tanh"):
        FusedTower(decoder)
    decoder.layers[1] = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match="no kernel for a layer of type Identity"):
        FusedTower(decoder)
