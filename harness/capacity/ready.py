"""Compiles the simulator's functions before a fit needs them: at installation, or while a server starts.

``python -m harness.capacity.ready`` caches them on disk (see ``harness.jit``); a second call takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.capacity.planning.staged import StageModel, Topology, rounds
from harness.capacity.simulator.sessions import simulate
from harness.host.process_group import end_group, spawn


def compile_all() -> None:
    """Call each compiled function once, with the smallest possible input."""
    simulate(np.zeros(1), np.ones(1), lambda sessions: np.full(np.shape(sessions), 0.1))
    stage = StageModel("stage", alpha_s=0.01, tau0_s=0.01, delay_s=0.0, max_batch=1)
    rounds(Topology((stage,)), 1, np.random.default_rng(0), frames=1, warm_up=0)


@contextmanager
def compiled_beside() -> Iterator[subprocess.Popen]:
    """Compile in a process that ends with the block; ``wait`` for it before anything is measured."""
    command = [sys.executable, "-m", "harness.capacity.ready"]
    process = spawn(command, Path(os.devnull), niceness=5)  # lower priority than the server that starts meanwhile
    try:
        yield process
    finally:
        end_group(process, grace_s=0)


if __name__ == "__main__":
    compile_all()
