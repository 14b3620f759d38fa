"""Values of the GPU's attention kernels: by Triton's interpreter on a CPU, compiled where there is a GPU.

Needs the package ``triton``.
"""

import mmap
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import HAS_GPU
from interpreter import widen_products
from torch.nn.functional import scaled_dot_product_attention

from harness.errors import InputError
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
INTERPRETED = "TRITON_INTERPRET", "" if HAS_GPU else "1"
with pytest.MonkeyPatch.context() as patch:
    patch.setenv(*INTERPRETED)
    from harness.vibevoice.kernels import ragged

LENGTHS = [0, 1, 63, 64, 511, 512, 513, 1500]  # around the edges of tiles and parts
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv(*INTERPRETED)
    widen_products(monkeypatch)


@pytest.fixture
def draw():
    """``draw(*sizes, dtype=…)``: random numbers, the same in every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *sizes, dtype=torch.float32: torch.randn(*sizes, generator=generator).to(DEVICE, dtype)


def attention(cache, length, query, layer):
    """What one sequence should get, from a cache [layers, 2, KV heads, room, size] that holds its new position."""
    keys, values = cache[layer, :, None, :, : length + 1].float()
    return scaled_dot_product_attention(query[None, :, None].float(), keys, values, enable_gqa=True).flatten()


def check(caches, lengths, query, key, value, layer=1):
    """Each sequence attends to its own past and keeps its new position, and nothing else is written."""
    expected = [cache.clone() for cache in caches]
    for cache, length, new_key, new_value in zip(expected, lengths, key, value, strict=True):
        cache[layer, 0, :, length], cache[layer, 1, :, length] = new_key, new_value
    output = ragged.RaggedStep.of(caches, lengths).attend(layer, query, key, value)
    assert output.dtype == query.dtype
    for row, (cache, length) in enumerate(zip(expected, lengths, strict=True)):
        assert torch.equal(caches[row], cache)
        one = attention(cache, length, query[row], layer)
        torch.testing.assert_close(output[row].float(), one, atol=TOLERANCES[query.dtype], rtol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"),
    [
        (4, 2, 16, torch.float32),
        (7, 1, 128, torch.float32),
        (2, 2, 256, torch.float32),
        (12, 2, 128, torch.float16),
        (12, 2, 128, torch.bfloat16),
        (34, 2, 16, torch.bfloat16),
    ],
)
def test_every_sequence_attends_to_its_own_past_and_keeps_its_new_position(heads, kv_heads, size, dtype, draw):
    caches = [draw(2, 2, kv_heads, length + 3, size, dtype=dtype) for length in LENGTHS]
    check(caches, LENGTHS, *(draw(len(LENGTHS), count, size, dtype=dtype) for count in (heads, kv_heads, kv_heads)))


def test_more_parts_than_are_combined_at_once_are_one_answer(draw):
    lengths = [3, 17 * ragged._PART + 5]
    check([draw(2, 2, 1, length + 1, 16) for length in lengths], lengths, *(draw(2, n, 16) for n in (2, 1, 1)))


def test_parts_without_weight_do_not_count(draw):
    """One position far in the past outweighs all others."""
    length = 3 * ragged._PART
    cache = draw(2, 2, 1, length + 1, 16)
    query, key, value = draw(1, 2, 16), draw(1, 1, 16), draw(1, 1, 16)
    cache[1, 0, 0, 700] = 1000 * query[0, 0]
    check([cache], [length], query, key, value)


def test_views_into_a_common_projection_are_read_in_place(draw):
    made = draw(3, 8, 16)
    query, key, value = made.split((4, 2, 2), 1)
    assert all(ragged._aligned_rows(part) is part for part in (query, key, value))
    check([draw(2, 2, 2, 90, 16) for _ in range(3)], [80, 0, 7], query, key, value)


@pytest.mark.parametrize("part", ["transposed", "sparse", "misaligned"])
def test_other_views_are_copied(part, draw):
    query = {
        "transposed": lambda: draw(4, 3, 16).transpose(0, 1),
        "sparse": lambda: draw(3, 4, 32)[:, :, ::2],
        "misaligned": lambda: draw(3 * 4 * 16 + 1)[1:].view(3, 4, 16),
    }[part]()
    assert ragged._aligned_rows(query) is not query
    check([draw(2, 2, 2, 90, 16) for _ in range(3)], [80, 0, 7], query, draw(3, 2, 16), draw(3, 2, 16))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the memory is only promised, which a GPU does not do")
def test_a_layer_lies_where_32_bits_do_not_reach(draw):
    """A layer that lies 2^32 elements from the start: in 32 bits it would be the first one."""
    layers, size, length = 16, 16, 70
    room = 2**32 // (2 * (layers - 1) * size) + 1
    shape = layers, 2, 1, room, size
    memory = mmap.mmap(-1, torch.Size(shape).numel() * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    cache = torch.frombuffer(memory, dtype=torch.float16).view(shape)  # 0x4000: MAP_NORESERVE, of no more than is used
    cache[-1, :, :, :length] = draw(2, 1, length, size, dtype=torch.float16)
    query, key, value = (draw(1, count, size, dtype=torch.float16) for count in (2, 1, 1))
    output = ragged.RaggedStep.of([cache], [length]).attend(layers - 1, query, key, value)
    assert torch.equal(cache[-1, :, 0, length], torch.stack((key, value))[:, 0, 0])
    one = attention(cache, length, query[0], layers - 1)
    torch.testing.assert_close(output[0].float(), one, atol=TOLERANCES[torch.float16], rtol=0)


@pytest.mark.parametrize("size", ragged.HEAD_SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_head_of_every_layer_lies_at_a_multiple_of_16_bytes(size, dtype):
    """In rooms of any length: the kernels tell the compiler so of every cache from torch.empty."""
    for room in (1, 3, 101):
        cache = torch.empty(3, 2, 2, room, size, dtype=dtype, device=DEVICE)
        facts = ragged._facts(cache, 0)
        heads = [
            cache[layer, kind, head, at] for layer in range(3) for kind in (0, 1) for head in (0, 1) for at in (0, -1)
        ]
        assert {head.data_ptr() % 16 for head in heads} == {0} and facts == [cache.data_ptr(), room, 0]
        assert ragged._tile_positions(size, dtype) >= 16 and ragged._PART % ragged._tile_positions(size, dtype) == 0


@pytest.mark.parametrize(
    ("cache", "length", "message"),
    [
        (torch.empty(2 * 2 * 4 * 16 + 1, device=DEVICE)[1:].view(1, 2, 2, 4, 16), 0, "aligned to 16 bytes"),
        (torch.empty(1, 2, 4, 2, 16, device=DEVICE).transpose(2, 3), 0, "not contiguous"),
        (torch.empty(1, 2, 2, 4, 16, device=DEVICE), 4, "of 4 positions, of which 4 are filled"),
        (torch.empty(1, 2, 2, 4, 16, device=DEVICE), -1, "no room"),
    ],
)
def test_a_cache_that_the_kernels_would_misread_is_refused(cache, length, message):
    with pytest.raises(ValueError, match=message):
        ragged.RaggedStep.of([cache], [length])


@pytest.mark.parametrize("size", [8, 24, 80, 512])
def test_a_head_size_that_cannot_be_compiled_is_refused_when_a_stage_is_built(size):
    with pytest.raises(InputError, match=f"head size {size}, only 16, 32, 64, 128, 256"):
        ragged.prepare(4, 2, size, torch.bfloat16, DEVICE)


def test_a_host_without_a_c_compiler_is_told_what_to_install(monkeypatch):
    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(ragged.RaggedStep, "attend", fail)
    said = "Failed to find C compiler. Please specify via CC environment variable"
    with pytest.raises(InputError, match=r"Failed to find C compiler.*install gcc and the headers of Python 3\."):
        ragged.prepare(4, 2, 16, torch.bfloat16, DEVICE)
    said = "CUDA error: an illegal memory access"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ragged.prepare(4, 2, 16, torch.bfloat16, DEVICE)


def test_a_stage_on_a_gpu_compiles_the_kernels_when_it_is_built(monkeypatch):
    weights, prepared = Weights("tiny", plain=True), []
    names = "config", "backbone", "compiled", "acoustic_connector", "semantic_connector", "head_rows"
    on_gpu = SimpleNamespace(**{name: getattr(weights, name) for name in names})
    on_gpu.device, on_gpu.dtype, on_gpu.graph_batch = torch.device("cuda:1"), torch.bfloat16, 0
    monkeypatch.setattr(ragged, "prepare", lambda *shape: prepared.append(shape))
    LLMStage(on_gpu)
    LLMStage(weights)
    assert prepared == [(4, 2, 16, torch.bfloat16, torch.device("cuda:1"))]


def test_kernels_start_on_the_gpu_that_holds_the_caches(monkeypatch, draw):
    assert ragged.on_device(torch.device("cuda:1")).idx == 1
    inside, started = [], []

    @contextmanager
    def guard(device):
        inside.append(device)
        yield
        inside.clear()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: started.append(list(inside))

    for name in ("_attend_part", "_combine"):
        monkeypatch.setattr(ragged, name, Kernel())
    monkeypatch.setattr(ragged, "on_device", guard)
    cache = draw(1, 2, 2, 4, 16)
    ragged.RaggedStep.of([cache], [0]).attend(0, draw(1, 4, 16), draw(1, 2, 16), draw(1, 2, 16))
    assert started == [[cache.device], [cache.device]]
