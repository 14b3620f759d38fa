"""Must be imported first by coverage.py, which has the name of a package that numba looks for.

Numba is imported here as if there were no such package. If numba itself found coverage.py (beside another
benchmark), an ImportError makes it go on without.
"""

import sys

_NAME = "coverage"

if "numba" not in sys.modules:
    _own, sys.modules[_NAME] = sys.modules.get(_NAME), None
    try:
        import numba  # noqa: F401
    finally:
        del sys.modules[_NAME]
        if _own is not None:
            sys.modules[_NAME] = _own
elif not hasattr(sys.modules["numba"], "njit"):
    raise ImportError("coverage.py beside this file is a benchmark, not the package")
