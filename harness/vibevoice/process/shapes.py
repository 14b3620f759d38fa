"""Keeps a tensor of an impossible shape from crashing the process that serves a model.

Triton (2.51) checks a tensor's bytes against its shape in arithmetic that overflows: INT32 [2**62] takes 0 bytes. Its
Python stub then asks numpy for an array of that shape, and the exception that numpy raises ends the process. After
``guard``, the stub gets an empty array of IMPOSSIBLE_NDIM dimensions for such a shape: see ``is_impossible``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

IMPOSSIBLE_NDIM = 31
_MOST_VALUES = 1 << 40
_SIDE = 1 << 20
_NEW_FROM_DESCR = 94  # index of PyArray_NewFromDescr in numpy's table of C functions
_SIGNATURE = (
    ctypes.c_void_p,  # the array, or NULL with an exception
    ctypes.c_void_p,  # class
    ctypes.c_void_p,  # data type; the function steals its reference
    ctypes.c_int,  # dimensions
    ctypes.POINTER(ctypes.c_ssize_t),  # sizes
    ctypes.c_void_p,  # strides
    ctypes.c_void_p,  # data
    ctypes.c_int,  # flags
    ctypes.c_void_p,  # another array
)
_EMPTY = (ctypes.c_ssize_t * IMPOSSIBLE_NDIM)()
_kept: list = []  # the stub holds pointers to these: they must live as long as the process


def is_possible(sizes: list[int]) -> bool:
    """Whether an array of these sizes can exist: no size is negative, and their product fits in memory."""
    values = 1
    for size in sizes:
        if not 0 <= size <= _MOST_VALUES:
            return False
        values *= max(size, 1)
    return values <= _MOST_VALUES


def is_impossible(array: np.ndarray) -> bool:
    """Whether this array stands for a tensor of an impossible shape."""
    return array.ndim == IMPOSSIBLE_NDIM


def guard(use_numpy: Callable[[], object]) -> None:
    """Make the native code first used in ``use_numpy`` get arrays through a function that refuses impossible shapes.

    That code reads numpy's table of functions once, at that moment; for all other code the table stays unchanged.
    """
    table = _table()
    original = table[_NEW_FROM_DESCR]
    replacement = _checked(original)
    _kept.append(replacement)
    table[_NEW_FROM_DESCR] = ctypes.cast(replacement, ctypes.c_void_p).value
    try:
        use_numpy()
    finally:
        table[_NEW_FROM_DESCR] = original


def _table():
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    pointer = get_pointer(np.core.multiarray._ARRAY_API, None)
    return ctypes.cast(pointer, ctypes.POINTER(ctypes.c_void_p))


def _checked(original: int):
    """PyArray_NewFromDescr, except for impossible shapes. It must not be traced: exceptions could not leave it."""
    make = ctypes.PYFUNCTYPE(*_SIGNATURE)(original)

    def new(kind, dtype, ndim, sizes, strides, data, flags, like):
        # Nearly every tensor has two short sides: checked without building a list, which takes twice as long.
        if (ndim == 2 and 0 <= sizes[0] <= _SIDE and 0 <= sizes[1] <= _SIDE) or is_possible(sizes[:ndim]):
            return make(kind, dtype, ndim, sizes, strides, data, flags, like)
        return make(kind, dtype, IMPOSSIBLE_NDIM, _EMPTY, None, None, 0, None)

    return ctypes.PYFUNCTYPE(*_SIGNATURE)(new)
