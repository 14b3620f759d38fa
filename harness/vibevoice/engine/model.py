"""The engine that a model's configuration asks for.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import os
import time
from functools import partial

from harness import wire
from harness.errors import InputError
from harness.vibevoice import backend
from harness.vibevoice.engine.frame_step import EagerStep
from harness.vibevoice.engine.loop import Engine
from harness.vibevoice.engine.step_metrics import step_readings
from harness.vibevoice.process.exporter import session_readings
from harness.vibevoice.process.instances import instance_name, instances
from harness.vibevoice.process.parameters import number, parameters
from harness.vibevoice.process.setup import prepare

GRACE_S = 1.0  # for its sessions to send their last responses


def engine_of(args: dict) -> Engine:
    """The engine of an instance. Raises InputError for a configuration that this host cannot serve."""
    given = parameters(args)
    weights = backend.weights(args)
    most, places = number(given, "max_batch"), max(1, number(given, "sessions_at_once") // instances(args))
    if weights.graph_batch:
        from harness.vibevoice.engine.graph_step import GraphStep, table_bytes  # needs a GPU to compile

        if most > weights.graph_batch:
            raise InputError(
                f"max_batch is {most}, but a step on this GPU takes at most {weights.graph_batch} sessions (`graphs`): "
                "lower the one or raise the other"
            )
        step = GraphStep(weights, backend.kv_room(args, weights, table_bytes(weights, places)), places)
    else:
        step = EagerStep(weights, backend.kv_room(args, weights), number(given, "prefill_tokens"))
    in_hand_s = number(given, "in_hand_seconds")
    engine = Engine(step, most, _end_process, lambda: prepare(weights.device), in_hand_s)
    owner = wire.ENGINE, instance_name(args)
    backend.export(owner, partial(step_readings, engine.counts), partial(session_readings, step.llm, owner))
    return engine


def _end_process(error: Exception) -> None:
    """End the process, which cannot serve without its engine; it is then restarted."""
    print(f"the engine has stopped, and its process ends: {error!r}", flush=True)
    time.sleep(GRACE_S)
    os._exit(1)
