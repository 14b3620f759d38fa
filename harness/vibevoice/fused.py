"""The engine that a model's configuration asks for.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import os

from harness.vibevoice import backend
from harness.vibevoice.engine import Engine
from harness.vibevoice.frame_step import EagerStep
from harness.vibevoice.parameters import number, parameters


def engine_of(args: dict) -> Engine:
    """Raises InputError for a configuration that this host cannot serve."""
    given = parameters(args)
    weights = backend.weights(args)
    room = backend.kv_room(args, weights)
    prompt_tokens, most = number(given, "prefill_tokens"), number(given, "max_batch")
    if weights.graph_batch:
        from harness.vibevoice.graph_step import GraphStep  # its kernels are compiled for a GPU

        step = GraphStep(weights, room, number(given, "sessions_at_once"))
    else:
        step = EagerStep(weights, room, prompt_tokens)
    return Engine(step, most, _end_process)


def _end_process(error: Exception) -> None:
    """A process whose engine has stopped serves nobody: it ends, and is started again."""
    print(f"the engine has stopped, and its process ends: {error!r}", flush=True)
    os._exit(1)
