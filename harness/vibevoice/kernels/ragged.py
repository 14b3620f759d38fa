"""Attention of one new position per sequence over caches of any lengths, on a GPU: two kernels for a whole batch.

Each sequence's cache stays in place: the kernels take addresses. A long cache is split into parts that are processed
in parallel and then combined, as in flash-decoding (Dao, Haziza, Massa and Sizov, 2023), so that one long session
among short ones uses the whole GPU and costs the short ones nothing.

Triton compiles a variant of a kernel for each type, each constant and each specialised property of an argument. Only
the model's shape and dtype are constants here, so that one variant serves all layers, contexts and batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from subprocess import CalledProcessError

import torch
import triton
import triton.language as tl

from harness.errors import InputError

HEAD_SIZES = (16, 32, 64, 128, 256)  # powers of two, at least 16: the sides of a matrix product on tensor cores
_PART = 512  # positions per program
_FEWEST_PARTS = 2  # per graph
_TILE_BYTES = 16 << 10  # of keys per pass of its loop, so that several tiles in flight fit in 99 KiB on an sm_89
_MOST_POSITIONS, _FEWEST_ROWS = 64, 16  # per tile; per matrix product on tensor cores
_PARTS_AT_ONCE = 16  # combined per pass
_ALIGNMENT = 16  # bytes: the widest load of one thread
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_NO_C_COMPILER = (
    "the kernels for GPUs cannot be started on {device}: {error}. Triton must compile a small C module first: "
    f"install gcc and the headers of Python {_PYTHON} (Debian: python{_PYTHON}-dev), or use device cpu"
)


class RaggedStep:
    """One step of many sequences: writes their new position, then each attends to its past and the new position.

    ``facts`` [rows, 3] on the device: address, capacity and length of each sequence's cache, as ``facts_of`` returns
    them; ``parts``: at least ``parts_of`` their lengths.
    """

    def __init__(self, facts: torch.Tensor, parts: int):
        self.facts, self.parts, self.on_device = facts, parts, on_device(facts.device)

    @classmethod
    def of(cls, caches: list[torch.Tensor], lengths: list[int]) -> RaggedStep:
        """A step over these caches. Raises as ``facts_of``."""
        device = caches[0].device
        # Pinned: a copy from pageable memory would wait until the GPU has finished all queued work.
        facts = torch.tensor(facts_of(caches, lengths), pin_memory=device.type == "cuda")
        return cls(facts.to(device, non_blocking=True), parts_of(lengths))

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [rows, heads, size], key and value [rows, KV heads, size] -> [rows, heads x size]."""
        rows, heads, size = query.shape
        kv_heads = key.shape[1]
        query, key, value = (_aligned_rows(tensor) for tensor in (query, key, value))
        partial = torch.empty(rows, heads, self.parts, size, dtype=torch.float32, device=query.device)
        peaks_and_masses = torch.empty(rows, heads, self.parts, 2, dtype=torch.float32, device=query.device)
        output = torch.empty(rows, heads * size, dtype=query.dtype, device=query.device)
        group = heads // kv_heads
        group_room = max(_FEWEST_ROWS, triton.next_power_of_2(group))
        with self.on_device:
            _attend_part[rows, kv_heads, self.parts](
                query, key, value, self.facts, partial, peaks_and_masses,
                query.stride(0), key.stride(0), value.stride(0), layer, self.parts,
                kv_heads=kv_heads, group=group, group_room=group_room, size=size, part=_PART,
                block=_tile_positions(size, query.dtype), align=_ALIGNMENT,
            )  # fmt: skip
            _combine[rows, heads](
                partial, peaks_and_masses, self.facts, output, self.parts,
                heads=heads, size=size, part=_PART, block=_PARTS_AT_ONCE,
            )  # fmt: skip
        return output


class RaggedRows(RaggedStep):
    """New positions, several of which may be neighbours in one cache: all are written before any attends."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, kv_heads, size = key.shape
        key, value = (_aligned_rows(tensor) for tensor in (key, value))
        with self.on_device:
            _write[rows, kv_heads](
                key, value, self.facts, key.stride(0), value.stride(0), layer,
                kv_heads=kv_heads, size=size, align=_ALIGNMENT,
            )  # fmt: skip
        return super().attend(layer, query, key, value)


def facts_of(caches: list[torch.Tensor], lengths: list[int]) -> list[list[int]]:
    """Address, capacity and length of each cache, checked because the kernels rely on them.

    ``caches``: for each sequence [layers, 2, KV heads, room, size], contiguous; ``lengths``: positions filled in each.
    Raises ValueError for a full cache or another layout, and InputError for a head size not in HEAD_SIZES.
    """
    check_head_size(caches[0].shape[4])
    return [_facts(cache, length) for cache, length in zip(caches, lengths, strict=True)]


def parts_of(lengths: list[int]) -> int:
    """Number of parts into which the longest of these sequences is split, including its new position."""
    return max(lengths) // _PART + 1


def recorded_parts(positions: int) -> list[int]:
    """Numbers of parts for which steps over caches of up to ``positions`` are recorded as CUDA graphs.

    A graph starts programs for all its parts; those beyond a cache's length end at once.
    """
    numbers = [_FEWEST_PARTS]
    while numbers[-1] * _PART < positions:
        numbers.append(4 * numbers[-1])
    return numbers


def prepare(heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load the kernels for a model's shape, in seconds, so that no session has to wait for it.

    Raises InputError for a head size that is not in HEAD_SIZES, and where Triton finds no C compiler.
    """
    check_head_size(size)
    made = [torch.zeros(1, count, size, dtype=dtype, device=device) for count in (heads, kv_heads, kv_heads)]
    cache = torch.zeros(1, 2, kv_heads, 1, size, dtype=dtype, device=device)
    with compiling(device):
        RaggedStep.of([cache], [0]).attend(0, *made)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """A context for the first launch of kernels. Raises InputError where Triton finds no C compiler."""
    try:
        yield
    except (RuntimeError, CalledProcessError) as error:
        if isinstance(error, CalledProcessError) or "C compiler" in str(error):
            raise InputError(_NO_C_COMPILER.format(device=device, error=error)) from error
        raise


def check_head_size(size: int) -> None:
    """Raise InputError for a head size that is not in HEAD_SIZES."""
    if size not in HEAD_SIZES:
        raise InputError(
            f"the attention kernels for GPUs do not support head size {size}, only {', '.join(map(str, HEAD_SIZES))}: "
            "change hidden_size or num_attention_heads (size = hidden_size / num_attention_heads), or use device cpu"
        )


def on_device(device: torch.device):
    """A context in which kernels start on this device; without it they start on the thread's current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _facts(cache: torch.Tensor, length: int) -> list[int]:
    """Address, capacity and length of a cache, checked: the kernels would otherwise overwrite other memory."""
    address, room = cache.data_ptr(), cache.shape[3]
    if address % _ALIGNMENT or not cache.is_contiguous():
        raise ValueError(
            f"a KV cache of shape {list(cache.shape)} at address {address} is not contiguous and aligned to "
            f"{_ALIGNMENT} bytes: allocate it with torch.empty"
        )
    if not 0 <= length < room:
        raise ValueError(f"a KV cache of {room} positions, of which {length} are filled, has no room for the new one")
    return [address, room, length]


def _aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [rows, heads, size] whose rows are a whole number of heads apart; copied if they are not."""
    size = tensor.shape[2]
    in_place = tensor.stride()[1:] == (size, 1) and tensor.stride(0) % size == 0
    if in_place and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _tile_positions(size: int, dtype: torch.dtype) -> int:
    return min(_MOST_POSITIONS, _TILE_BYTES // (size * dtype.itemsize))


@triton.jit(do_not_specialize=["query_stride", "key_stride", "value_stride", "layer", "parts"])
def _attend_part(
    query, new_keys, new_values, facts, partial, peaks_and_masses,
    query_stride, key_stride, value_stride, layer, parts,
    kv_heads: tl.constexpr, group: tl.constexpr, group_room: tl.constexpr,
    size: tl.constexpr, part: tl.constexpr, block: tl.constexpr, align: tl.constexpr,
):  # fmt: skip
    """One part of one sequence and KV head: the weighted sum of its values, with the weights' maximum and sum."""
    # A cache may hold more than 2^31 elements: every index is converted to 64 bits before it is multiplied.
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.program_id(2).to(tl.int64)
    length = tl.load(facts + row * 3 + 2)  # positions before the new one, which comes last
    start = index * part
    if start <= length:
        cache = tl.load(facts + row * 3).to(tl.pointer_type(query.dtype.element_ty))
        stride = tl.load(facts + row * 3 + 1) * size
        keys = tl.multiple_of(cache, align) + (layer.to(tl.int64) * 2 * kv_heads + head) * stride
        values = keys + kv_heads * stride
        column, member = tl.arange(0, size)[None, :], tl.arange(0, group_room)
        known = member < group
        heads = head * group + member
        q = tl.multiple_of(query + row * query_stride, align)
        q = tl.load(q + heads[:, None] * size + column, mask=known[:, None], other=0.0)
        # The new key and value repeated to fill the group's padding: a single row would be read two bytes per thread.
        copies = tl.zeros((group_room, 1), tl.int32) + column
        new_key = tl.load(tl.multiple_of(new_keys + row * key_stride + head * size, align) + copies)
        new_value = tl.load(tl.multiple_of(new_values + row * value_stride + head * size, align) + copies)
        is_last = length < start + part  # the new position is in this part: written here, for later steps
        first_copy = is_last & (member == 0)[:, None]
        tl.store(keys + length * size + copies, new_key, mask=first_copy)
        tl.store(values + length * size + copies, new_value, mask=first_copy)
        own = tl.sum(q.to(tl.float32) * new_key.to(tl.float32), axis=1) * size**-0.5
        peak = tl.where(is_last, own, float("-inf"))
        mass = tl.where(is_last, tl.full((group_room,), 1.0, tl.float32), 0.0)
        total = tl.where(is_last, new_value.to(tl.float32), 0.0)
        keys += start * size
        values += start * size
        count = tl.minimum(length - start, part).to(tl.int32)
        for offset in range(0, count, block):
            position = offset + tl.arange(0, block)
            before = position < count
            place = position.to(tl.int64)[:, None] * size + column
            k = tl.load(keys + place, mask=before[:, None], other=0.0)
            v = tl.load(values + place, mask=before[:, None], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * size**-0.5
            score = tl.where(before[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, axis=1))
            weight, fade = tl.exp(score - higher[:, None]), tl.exp(peak - higher)
            mass = mass * fade + tl.sum(weight, axis=1)
            total = total * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            peak = higher
        at = (row * kv_heads * group + heads) * parts + index
        tl.store(peaks_and_masses + at * 2, peak, mask=known)
        tl.store(peaks_and_masses + at * 2 + 1, mass, mask=known)
        tl.store(partial + at[:, None] * size + column, total, mask=known[:, None])


@triton.jit(do_not_specialize=["key_stride", "value_stride", "layer"])
def _write(
    new_keys, new_values, facts, key_stride, value_stride, layer,
    kv_heads: tl.constexpr, size: tl.constexpr, align: tl.constexpr,
):  # fmt: skip
    """Write one new key and value into its cache."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cache = tl.load(facts + row * 3).to(tl.pointer_type(new_keys.dtype.element_ty))
    stride, length = tl.load(facts + row * 3 + 1) * size, tl.load(facts + row * 3 + 2)
    keys = tl.multiple_of(cache, align) + (layer.to(tl.int64) * 2 * kv_heads + head) * stride + length * size
    column = tl.arange(0, size)
    tl.store(keys + column, tl.load(tl.multiple_of(new_keys + row * key_stride + head * size, align) + column))
    values = tl.load(tl.multiple_of(new_values + row * value_stride + head * size, align) + column)
    tl.store(keys + kv_heads * stride + column, values)


@triton.jit(do_not_specialize=["parts"])
def _combine(
    partial, peaks_and_masses, facts, output, parts,
    heads: tl.constexpr, size: tl.constexpr, part: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one sequence and query head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    count = (tl.load(facts + row * 3 + 2) // part + 1).to(tl.int32)
    at = (row * heads + head) * parts
    column = tl.arange(0, size)
    peak, mass, total = float("-inf"), 0.0, tl.zeros((size,), tl.float32)
    for first in range(0, count, block):
        index = first + tl.arange(0, block)
        known = index < count
        peaks = tl.load(peaks_and_masses + (at + index) * 2, mask=known, other=float("-inf"))
        masses = tl.load(peaks_and_masses + (at + index) * 2 + 1, mask=known, other=0.0)
        place = (at + index)[:, None] * size + column[None, :]
        totals = tl.load(partial + place, mask=known[:, None], other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, axis=0))
        fade, weight = tl.exp(peak - higher), tl.exp(peaks - higher)
        mass = mass * fade + tl.sum(masses * weight, axis=0)
        total = total * fade + tl.sum(totals * weight[:, None], axis=0)
        peak = higher
    tl.store(output + (row * heads + head) * size + column, (total / mass).to(output.dtype.element_ty))
