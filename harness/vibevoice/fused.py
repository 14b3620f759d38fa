"""The engine that a model's configuration asks for.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import os

import triton_python_backend_utils as pb

from harness.vibevoice import backend
from harness.vibevoice.engine import Engine
from harness.vibevoice.frame_step import EagerStep
from harness.vibevoice.parameters import number, parameters
from harness.vibevoice.step_metrics import StepMetrics


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
    engine = Engine(step, most, _end_process)
    _count(engine)
    return engine


def _count(engine: Engine) -> None:
    """Show the engine's counts on the Prometheus page of this server, if it has one."""
    try:
        metrics = StepMetrics(engine.counts, _counter)
    except pb.TritonModelException as error:
        print(f"the steps of the engine are not counted on the server's metrics page: {error}", flush=True)
    else:
        metrics.keep_updated()


def _counter(name: str, about: str) -> pb.MetricFamily:
    return pb.MetricFamily(name=name, description=about, kind=pb.MetricFamily.COUNTER)


def _end_process(error: Exception) -> None:
    """A process whose engine has stopped serves nobody: it ends, and is started again."""
    print(f"the engine has stopped, and its process ends: {error!r}", flush=True)
    os._exit(1)
