"""The exit codes of ``harness`` and of load tests; ``harness doctor`` exits with 1 where a check failed."""

from __future__ import annotations

MET, MISSED, INCONCLUSIVE = 0, 1, 2  # verdicts of a sign-off
OF_VERDICT = {"met": MET, "missed": MISSED, "inconclusive": INCONCLUSIVE, "planning estimate": INCONCLUSIVE}
WORSE = 1  # of a comparison
OF_COMPARISONS = {
    0: "no regression is shown, and every figure is known: B is better, or no difference is shown",
    WORSE: "B is worse than A in some figure",
    INCONCLUSIVE: "inconclusive: some figure is not known in both runs, and none is worse",
}
USAGE = 64  # EX_USAGE of sysexits.h
UNAVAILABLE = 69  # EX_UNAVAILABLE
INTERNAL = 70  # EX_SOFTWARE; Python's own 1 would mean "missed"
INTERRUPTED = 130
OF_COMMANDS = {
    USAGE: "usage error: the command's arguments cannot be used",
    UNAVAILABLE: "a server that cannot be started or reached, or that ended",
    INTERNAL: "internal error of the harness",
    INTERRUPTED: "interrupted, by Ctrl-C or SIGTERM",
}
# Of `locust -f FILE`.
FAILURES, UNUSABLE, INVALID = 1, 2, 3
OF_LOAD_TESTS = {
    0: "all is well",
    FAILURES: "requests failed (Locust's own)",
    UNUSABLE: "an option or the server cannot be used",
    INVALID: "the measurement is INVALID, for the reasons printed",
}
