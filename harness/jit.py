"""How functions are compiled by numba, and kept on disk for the next process."""

from __future__ import annotations

from typing import Any

from numba import njit

# Without reference counts (_nrt): none of these functions makes an array, and counting would take most of the time.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def kept(function, jit=njit):
    """Compiled, and kept beside the source or in NUMBA_CACHE_DIR, if there is a folder that can be written.

    To tell whether what it kept is stale, numba looks at the file of this function and at the types of its arguments:
    what else it is made of must show in one of these. The function itself raises nothing.
    """
    try:
        chosen = jit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # there is no such folder
        return jit(**OPTIONS)(function)
    anew = None

    def call(*args):
        nonlocal chosen, anew
        try:
            return chosen(*args)
        except Exception as error:  # of the folder, which is full, or of damaged files in it
            if anew is not None:
                raise
            folder = chosen.stats.cache_path
            print(f"{function.__name__} is compiled anew: delete {folder}, which cannot be used: {error!r}", flush=True)
            chosen = anew = jit(**OPTIONS)(function)
            return chosen(*args)

    return call
