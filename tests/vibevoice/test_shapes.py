"""Shapes that no tensor can have, as native code asks numpy for them."""

import ctypes
import sys

import numpy as np
import pytest

from harness.vibevoice.process import shapes

POSSIBLE = ([], [0], [1], [4], [2, 0], [0, 1 << 40], [1 << 40], [1, 2, 64], [1 << 20, 1 << 20])
IMPOSSIBLE = (
    [1 << 62],
    [(1 << 62) + 1],
    [-(1 << 63)],
    [-1],
    [1, 1 << 62],
    [1, -(1 << 62)],
    [1, 2, 1 << 61],
    [0, 1 << 62],
    [(1 << 40) + 1],
    [1 << 21, 1 << 20],
    [1 << 32, 1 << 32],
)


@pytest.mark.parametrize("sizes", POSSIBLE)
def test_a_shape_that_memory_could_hold_is_possible(sizes):
    assert shapes.is_possible(sizes)


@pytest.mark.parametrize("sizes", IMPOSSIBLE)
def test_a_shape_whose_bytes_overflow_is_not(sizes):
    assert not shapes.is_possible(sizes)


class Native:
    """Reads the function from numpy's table once, as pybind11 does, and makes arrays with it."""

    def __init__(self):
        self.address = 0

    def read(self):
        self.address = shapes._table()[shapes._NEW_FROM_DESCR]

    def array(self, sizes, kind="<i4"):
        dtype = np.dtype(kind)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dtype))  # the function takes it over
        make = ctypes.PYFUNCTYPE(ctypes.py_object, *shapes._SIGNATURE[1:])(self.address)
        given = (ctypes.c_ssize_t * max(1, len(sizes)))(*sizes)
        return make(id(np.ndarray), id(dtype), len(sizes), given, None, None, 0, None)


@pytest.fixture
def native():
    code = Native()
    before = shapes._table()[shapes._NEW_FROM_DESCR]
    shapes.guard(code.read)
    assert shapes._table()[shapes._NEW_FROM_DESCR] == before != code.address  # numpy's other users keep theirs
    return code


@pytest.mark.parametrize("sizes", IMPOSSIBLE)
def test_native_code_gets_an_array_that_says_so(native, sizes):
    array = native.array(sizes)
    assert shapes.is_impossible(array) and array.size == 0


@pytest.mark.parametrize("sizes", [[], [0], [3], [1, 2, 64]])
def test_native_code_gets_every_other_array_as_before(native, sizes):
    array = native.array(sizes, "<f4")
    assert list(array.shape) == sizes and array.dtype == np.float32 and not shapes.is_impossible(array)
    array[...] = 1
    assert array.sum() == array.size


def test_arrays_made_by_the_thousand_leak_nothing(native):
    dtype = np.dtype("<i4")
    before = sys.getrefcount(dtype)
    for sizes in ([1 << 62], [3]) * 500:
        native.array(sizes)
    assert abs(sys.getrefcount(dtype) - before) < 10
