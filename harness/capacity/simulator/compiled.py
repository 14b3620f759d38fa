"""The compiler settings of the simulator's functions, and the numbers that stand for names in them."""

from __future__ import annotations

from numba import njit

from harness.jit import OPTIONS

# What kept functions are made of: ``layout.SETUP``, a type of their arguments, has a field that all these files name.
COMPILED_FILES = ("compiled.py", "structures.py", "device.py", "queues.py", "segments.py", "loop.py", "frames.py")

compiled = njit(forceinline=True, **OPTIONS)
apart = njit(**OPTIONS)  # of what is called seldom: to inline it everywhere takes long to compile

END_OF_BLOCK, GROW, OVER = 0, 1, 2  # what ``loop.run`` answers

DONE, REFUSED, GAVE_UP, LOST, ARRIVED, GOOD = 0, 1, 2, 3, 4, 5  # columns of ``counts``; the first four are outcomes
WAITING, ACTIVE = 6, 7  # outcomes of sessions that have not left yet
WAIT, TTFA, RTF, STALL, STAY = 0, 1, 2, 3, 4  # metrics

OFF, STARTING, UP, DRAINING, DOWN = 0, 1, 2, 3, 4  # states of a device
FAIL, REPAIR, DRAIN, RAISE = 0, 1, 2, 3  # actions of the schedule
SHARED, LEAST_LOADED, ROUND_ROBIN, RANDOM = 0, 1, 2, 3  # routings
LOSE, RESTART, RESUME = 0, 1, 2  # what becomes of the sessions of a device that fails
