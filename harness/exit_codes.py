"""Every exit code of the harness's commands, written once."""

from __future__ import annotations

MET, MISSED, INCONCLUSIVE = 0, 1, 2  # of a sign-off, by its verdict
OF_VERDICT = {"met": MET, "missed": MISSED, "inconclusive": INCONCLUSIVE}
# Of `locust -f FILE`; 1 is Locust's own, for requests that failed.
UNUSABLE, INVALID = 2, 3
USAGE = 64  # EX_USAGE of sysexits.h: the command was given something it cannot use
UNAVAILABLE = 69  # EX_UNAVAILABLE: a server that cannot be started or reached, or that ended
INTERNAL = 70  # EX_SOFTWARE: Python's own 1 would read as "missed"
INTERRUPTED = 130
