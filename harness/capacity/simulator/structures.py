"""Compiled data structures: a tree of minima, a binary heap, and the bins of a histogram."""

from __future__ import annotations

import math

from harness.capacity.simulator.compiled import compiled

BINS_PER_OCTAVE = 128  # a bin is at most 1/128 of its value wide
LOWEST_EXPONENT, HIGHEST_EXPONENT = -14, 22  # from 2^-14 to 2^22: in seconds, 61 µs to 48 days
# The first holds what is below, zeros too; the last what is above.
BINS = 2 + (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_OCTAVE


@compiled
def bin_of(value):
    """The bin of a value: between neighbouring powers of two, all are equally wide."""
    if not value >= 2.0**LOWEST_EXPONENT:
        return 0
    if value >= 2.0**HIGHEST_EXPONENT:
        return BINS - 1
    mantissa, exponent = math.frexp(value)
    return 1 + (exponent - 1 - LOWEST_EXPONENT) * BINS_PER_OCTAVE + int((mantissa - 0.5) * 2 * BINS_PER_OCTAVE)


@compiled
def put(tree, index, value):
    """Change a leaf of a tree of minima: node i is the smaller of nodes 2i and 2i + 1, the second half are leaves."""
    node = (len(tree) >> 1) + index
    tree[node] = value
    while node > 1:
        node >>= 1
        least = min(tree[2 * node], tree[2 * node + 1])
        if tree[node] == least:
            break
        tree[node] = least


@compiled
def first(tree):
    """The lowest index among the smallest leaves; tree[1] is their value."""
    node, leaves = 1, len(tree) >> 1
    while node < leaves:
        node = 2 * node + (tree[2 * node] != tree[node])
    return node - leaves


@compiled
def push(keys, members, count, key, member):
    """Add to a binary heap of ``count`` entries."""
    place = count
    while place > 0 and key < keys[(place - 1) >> 1]:
        keys[place], members[place] = keys[(place - 1) >> 1], members[(place - 1) >> 1]
        place = (place - 1) >> 1
    keys[place], members[place] = key, member


@compiled
def pop(keys, members, count):
    """Remove and return the member with the smallest key of a binary heap of ``count`` entries."""
    least, last = members[0], count - 1
    key, member = keys[last], members[last]
    place, child = 0, 1
    while child < last:
        if child + 1 < last and keys[child + 1] < keys[child]:
            child += 1
        if key <= keys[child]:
            break
        keys[place], members[place] = keys[child], members[child]
        place, child = child, 2 * child + 1
    keys[place], members[place] = key, member
    return least
