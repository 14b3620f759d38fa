"""Compiles functions with numba and caches them on disk for later processes."""

from __future__ import annotations

from typing import Any

from numba import njit

# Without reference counting (_nrt): none of these functions creates an array, and counting would take most of the time.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def kept(function, jit=njit):
    """The compiled function, cached beside the source or in NUMBA_CACHE_DIR if a folder is writable.

    numba detects a stale cache entry by the file of this function and the types of its arguments: everything else that
    affects the code must appear in one of these. Compiling raises nothing.
    """
    try:
        chosen = jit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no writable folder
        return jit(**OPTIONS)(function)
    anew = None

    def call(*args):
        nonlocal chosen, anew
        try:
            return chosen(*args)
        except Exception as error:  # a full folder, or damaged files in it
            if anew is not None:
                raise
            folder = chosen.stats.cache_path
            print(
                f"{function.__name__} is compiled again: delete the unusable cache {folder}: {error!r}",
                flush=True,
            )
            chosen = anew = jit(**OPTIONS)(function)
            return chosen(*args)

    return call
