"""The engine's step counts as counters on Triton's Prometheus page; Triton's own statistics cover only requests."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator

from harness import wire
from harness.vibevoice.engine.loop import Counts

EVERY_S = 0.5  # each update is a call to the server's process
_ABOUT = {
    wire.ENGINE_STEPS: "Steps of the fused engine, by the sessions in them",
    wire.ENGINE_STEP_SECONDS: "Seconds of the steps of the fused engine, by the sessions in them",
    wire.ENGINE_PROMPT_TOKENS: "Prompt tokens that the fused engine has read",
    wire.ENGINE_PROMPT_SECONDS: "Seconds in which the fused engine has read prompts",
}


class StepMetrics:
    """Adds the growth of ``counts`` to counters; ``family(name, description)`` creates one, as ``pb.MetricFamily``."""

    def __init__(self, counts: Counts, family: Callable):
        self.counts = counts
        self._families = {name: family(name, about) for name, about in _ABOUT.items()}
        self._metrics: dict[tuple[str, str], object] = {}
        self._told: dict[tuple[str, str], float] = {}

    def update(self) -> None:
        for key, total in _totals(self.counts):
            grown = total - self._told.get(key, 0)
            if grown > 0:
                self._metric(*key).increment(grown)
                self._told[key] = total

    def keep_updated(self) -> None:
        """Update from a thread until the process ends: no thread may run while the interpreter shuts down."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(EVERY_S):
                try:
                    self.update()
                except Exception as error:  # the next update includes what this one missed
                    print(f"the steps of the engine could not be counted: {error}", flush=True)

        thread = threading.Thread(target=run, daemon=True, name="step metrics")
        thread.start()
        atexit.register(thread.join, 2 * EVERY_S)
        atexit.register(over.set)  # registered last, called first

    def _metric(self, name: str, batch: str):
        if (name, batch) not in self._metrics:
            labels = {wire.ENGINE_BATCH: batch} if batch else {}
            self._metrics[name, batch] = self._families[name].Metric(labels=labels)
        return self._metrics[name, batch]


def _totals(counts: Counts) -> Iterator[tuple[tuple[str, str], float]]:
    for batch, (steps, ns) in list(counts.steps.items()):  # a copy: the engine's thread goes on counting
        yield (wire.ENGINE_STEPS, str(batch)), steps
        yield (wire.ENGINE_STEP_SECONDS, str(batch)), ns / 1e9
    yield (wire.ENGINE_PROMPT_TOKENS, ""), counts.prompt_tokens
    yield (wire.ENGINE_PROMPT_SECONDS, ""), counts.prompt_ns / 1e9
