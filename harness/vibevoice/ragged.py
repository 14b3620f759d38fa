"""Attention of one new position per sequence over caches of any lengths, on a GPU: two kernels for a whole batch.

Each sequence's cache stays where it is: the kernels take addresses. A long cache is cut into parts that are attended to
side by side and then combined, as in flash-decoding (Dao, Haziza, Massa and Sizov, 2023), so that one long session
among short ones uses the whole GPU and costs the short ones nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PART = 512  # positions of one program
_BLOCK = 64  # positions in one pass of its loop
_FEWEST_ROWS = 16  # of a matrix product on tensor cores


class RaggedStep:
    """One step of many sequences: writes their new position, and lets each attend to its own past and to it.

    ``caches``: for each sequence [layers, 2, KV heads, room, size], contiguous; ``lengths``: positions filled in each.
    """

    def __init__(self, caches: list[torch.Tensor], lengths: list[int]):
        device = caches[0].device
        facts = [[cache.data_ptr(), cache.shape[3], length] for cache, length in zip(caches, lengths, strict=True)]
        self.addresses, self.rooms, self.lengths = torch.tensor(facts).t().contiguous().to(device)
        self.parts = max(lengths) // _PART + 1

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [rows, heads, size], key and value [rows, KV heads, size] -> [rows, heads x size]."""
        rows, heads, size = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        partial = torch.empty(rows, heads, self.parts, size, device=query.device)
        peaks_and_masses = torch.empty(2, rows, heads, self.parts, device=query.device)
        output = torch.empty_like(query)
        _attend_part[rows, kv_heads, self.parts](
            query, key, value, self.addresses, self.rooms, self.lengths, partial, *peaks_and_masses,
            layer, size**-0.5, self.parts, kv_heads=kv_heads, group=group,
            group_room=max(_FEWEST_ROWS, triton.next_power_of_2(group)), size=size, part=_PART, block=_BLOCK,
        )  # fmt: skip
        _combine[rows, heads](
            partial, *peaks_and_masses, self.lengths, output, self.parts, heads=heads, size=size, part=_PART
        )
        return output.view(rows, -1)


@triton.jit
def _attend_part(
    query, new_keys, new_values, addresses, rooms, lengths, partial, peaks, masses,
    layer, scale, parts, kv_heads: tl.constexpr, group: tl.constexpr, group_room: tl.constexpr,
    size: tl.constexpr, part: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One part of one sequence and KV head: the weighted sum of its values, with the peak and the mass of weights."""
    row, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)  # positions before the new one, which comes last
    start = index * part
    if start <= length:
        stride = tl.load(rooms + row) * size
        cache = tl.load(addresses + row).to(tl.pointer_type(query.dtype.element_ty))
        keys = cache + (layer * 2 * kv_heads + head) * stride
        values = keys + kv_heads * stride
        column, member = tl.arange(0, size), tl.arange(0, group_room)
        heads = (row * kv_heads + head) * group + member
        known = member < group
        q = tl.load(query + heads[:, None] * size + column[None, :], mask=known[:, None], other=0.0)
        new_key = tl.load(new_keys + (row * kv_heads + head) * size + column)
        new_value = tl.load(new_values + (row * kv_heads + head) * size + column)
        if length < start + part:  # the new position lies in this part: written here, for the steps to come
            tl.store(keys + length * size + column, new_key)
            tl.store(values + length * size + column, new_value)
        peak = tl.full((group_room,), float("-inf"), tl.float32)
        mass = tl.zeros((group_room,), tl.float32)
        total = tl.zeros((group_room, size), tl.float32)
        for offset in range(start, tl.minimum(start + part, length + 1), block):
            position = offset + tl.arange(0, block)
            before, is_new = (position < length)[:, None], (position == length)[:, None]
            place = position[:, None] * size + column[None, :]
            k = tl.where(is_new, new_key[None, :], tl.load(keys + place, mask=before, other=0.0))
            v = tl.where(is_new, new_value[None, :], tl.load(values + place, mask=before, other=0.0))
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            score = tl.where((position <= length)[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, axis=1))
            weight, fade = tl.exp(score - higher[:, None]), tl.exp(peak - higher)
            mass = mass * fade + tl.sum(weight, axis=1)
            total = total * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            peak = higher
        at = heads * parts + index
        tl.store(peaks + at, peak, mask=known)
        tl.store(masses + at, mass, mask=known)
        tl.store(partial + at[:, None] * size + column[None, :], total, mask=known[:, None])


@triton.jit
def _combine(
    partial, peaks, masses, lengths, output, parts, heads: tl.constexpr, size: tl.constexpr, part: tl.constexpr
):  # fmt: skip
    """The parts of one sequence and query head as one."""
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, size)
    at = (row * heads + head) * parts
    peak, mass, total = tl.load(peaks + at), tl.load(masses + at), tl.load(partial + at * size + column)
    for index in range(1, tl.load(lengths + row) // part + 1):
        other = tl.load(peaks + at + index)
        higher = tl.maximum(peak, other)
        mine, theirs = tl.exp(peak - higher), tl.exp(other - higher)
        mass = mass * mine + tl.load(masses + at + index) * theirs
        total = total * mine + tl.load(partial + (at + index) * size + column) * theirs
        peak = higher
    place = output + (row * heads + head) * size + column
    tl.store(place, (total / mass).to(output.dtype.element_ty))
