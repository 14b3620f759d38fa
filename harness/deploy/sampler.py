"""Samples the server while a trial runs: Triton's counts, CPU, memory and all GPUs, about once a second."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping

import psutil

from harness.client.target import Target
from harness.clock import HOST, Clock
from harness.deploy.statistics import StatisticsReader, engine_stage, prometheus
from harness.errors import ServerError
from harness.host import nvml
from harness.records.schema import GpuSample, ServerSample

# Triton metrics for the share of time in use, bytes in use and watts; the GPU's UUID is their label.
_OF_GPU = ("nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_power_usage")


class Probe:
    """Samples the servers of a target from its own thread, for the length of a ``with`` block.

    ``samples`` grows while it runs; ``missed`` counts samples for which a server did not answer. ``metrics_url``: its
    Prometheus page; None = there is none. ``clock``: of the servers; times of the samples are its times.
    """

    def __init__(
        self,
        target: Target | str,
        server_pid: int | None = None,
        interval_s: float = 1.0,
        metrics_url: str | None = None,
        clock: Clock = HOST,
    ):
        self.samples: list[ServerSample] = []
        self.missed = 0
        self._has_engine = False  # whether its counts were seen on the metrics page
        self._reader = StatisticsReader(target, clock)
        self._pid, self._metrics_url = server_pid, metrics_url
        self._interval_s, self._clock = interval_s, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)

    def __enter__(self) -> Probe:
        psutil.cpu_percent()  # the first call only sets the reference
        self._thread.start()
        return self

    def __exit__(self, error_type, *_) -> None:
        self._stop.set()
        self._thread.join()
        if error_type is None:
            self._look()
        self._reader.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(self._interval_s)

    def _look(self) -> None:
        try:
            stages = self._reader.snapshot()
        except ServerError:
            self.missed += 1
            return
        metrics, engine = engine_stage(prometheus(self._metrics_url) if self._metrics_url else {})
        self._has_engine |= engine is not None
        if self._has_engine and engine is None:  # else a window would count all since the start
            self.missed += 1
            return
        self.samples.append(
            ServerSample(
                at_ns=self._clock.now_ns(),
                stages=(*stages, engine) if engine else stages,
                cpu_percent=psutil.cpu_percent(),
                memory_bytes=tree_memory_bytes(self._pid) if self._pid else 0,
                gpus=nvml.load() if self._pid else gpus_of(metrics),
                metrics=metrics,
            )
        )


def tree_memory_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, in bytes; shared pages are counted once per process."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += one.memory_info().rss
    return total


def gpus_of(metrics: Mapping[str, float]) -> tuple[GpuSample, ...]:
    """Every GPU of another host, from Triton's Prometheus page there."""
    told: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        name, _, uuid = key.rstrip("}").partition("{")
        if name in _OF_GPU and uuid:
            told.setdefault(uuid, {})[name] = value
    return tuple(_gpu_sample(uuid, values) for uuid, values in sorted(told.items()))


def _gpu_sample(uuid: str, values: Mapping[str, float]) -> GpuSample:
    use, memory, power = (values.get(name) for name in _OF_GPU)
    return GpuSample(
        uuid, percent=None if use is None else 100 * use, memory_bytes=None if memory is None else int(memory),
        power_w=power,
    )  # fmt: skip
