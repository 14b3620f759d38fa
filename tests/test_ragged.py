"""The GPU's attention kernels, run by Triton's interpreter on the CPU: needs the package ``triton``, not a GPU."""

import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
from harness.vibevoice.ragged import RaggedStep  # noqa: E402

LENGTHS = [0, 1, 63, 64, 511, 512, 513, 1500]  # around the edges of blocks and parts


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (12, 2, 128), (28, 4, 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_every_sequence_attends_to_its_own_past_and_keeps_its_new_position(heads, kv_heads, size, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    caches = [draw(2, 2, kv_heads, length + 3, size) for length in LENGTHS]
    query, key, value = (draw(len(LENGTHS), count, size) for count in (heads, kv_heads, kv_heads))
    expected = [cache.clone() for cache in caches]
    for cache, length, new_key, new_value in zip(expected, LENGTHS, key, value, strict=True):
        cache[1, 0, :, length], cache[1, 1, :, length] = new_key, new_value
    output = RaggedStep(caches, LENGTHS).attend(1, query, key, value)
    for row, (cache, length) in enumerate(zip(expected, LENGTHS, strict=True)):
        assert torch.equal(caches[row], cache)  # the other layer and the free room are as they were
        keys, values = cache[1, :, None, :, : length + 1].float()
        one = scaled_dot_product_attention(query[row][None, :, None].float(), keys, values, enable_gqa=True)
        torch.testing.assert_close(output[row].float(), one.flatten(), atol=tolerance, rtol=0)
