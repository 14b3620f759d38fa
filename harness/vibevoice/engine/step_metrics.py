"""The engine's step counts as metrics of Triton's Prometheus page; Triton's own statistics cover only requests."""

from __future__ import annotations

from collections.abc import Iterator

from harness.server_metrics import ENGINE_PROMPT_SECONDS, ENGINE_PROMPT_TOKENS, ENGINE_STEP_SECONDS, ENGINE_STEPS
from harness.vibevoice.engine.loop import Counts
from harness.vibevoice.process.exporter import Reading


def step_readings(counts: Counts) -> Iterator[Reading]:
    for batch, (steps, ns) in list(counts.steps.items()):  # a copy: the engine's thread goes on counting
        yield Reading(ENGINE_STEPS, steps, (str(batch),))
        yield Reading(ENGINE_STEP_SECONDS, ns / 1e9, (str(batch),))
    yield Reading(ENGINE_PROMPT_TOKENS, counts.prompt_tokens)
    yield Reading(ENGINE_PROMPT_SECONDS, counts.prompt_ns / 1e9)
