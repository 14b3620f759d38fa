"""Shared code of the benchmarks: arguments, a server and its processes, a table, and the last line of figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from harness import wire
from harness.deploy.server import TritonServer, serving
from harness.deploy.statistics import StatisticsReader, difference
from harness.errors import HarnessError, InputError
from harness.records.schema import Outcome, Request, Result, StageStatistics
from harness.server_metrics import KV_PROMISED, QUEUE_LENGTH, SESSIONS, STAGE_SESSIONS

EXIT_FAILED = 1  # it ran, but a figure is not as required
EXIT_MISTAKE = 64  # EX_USAGE of sysexits.h
EXIT_INTERRUPTED = 130
SERVER = "tritonserver"
SHARED = "shared memory"
_SIGNIFICANT_DIGITS = 5

out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
err = Console(stderr=True, highlight=False)


class Parser(argparse.ArgumentParser):
    """Arguments with an example at the end of ``--help``; a usage error is one line and exit code 64."""

    def __init__(self, description: str, example: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            description=description, epilog=f"Example:\n  {example}", formatter_class=raw, allow_abbrev=False
        )
        self.add_argument(
            "--quick",
            action="store_true",
            help="a run of a few seconds, to check that it works; its figures mean nothing",
        )

    def error(self, message: str):
        self.exit(EXIT_MISTAKE, f"{self.prog}: {message}; see --help\n")


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argument that is a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[-+]?\d{1,18}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """An argument that is a number from ``low`` to ``high``."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")

    return parse


def several(one: Callable) -> Callable[[str], list]:
    """An argument that holds values with commas between them."""
    return lambda text: [one(part.strip()) for part in text.split(",")]


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call a script's ``main(arguments)`` and exit: a usage error is one line, Ctrl-C ends cleanly with code 130."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(signum, _as_interrupt)
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        err.print(str(error), style="red", markup=False, soft_wrap=True)
        sys.exit(EXIT_MISTAKE)
    except HarnessError as error:
        err.print(str(error), style="red", markup=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _as_interrupt(*_) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):  # a second signal would interrupt the clean-up, which is short
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def say(text: str) -> None:
    """Print a progress line to standard error, so that standard output has only the result."""
    err.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def served(preset: str = "tiny", **deployment) -> Iterator[TritonServer]:
    """A local Triton that serves a deployment (fields of ``Deployment``); always stopped on exit."""
    say(f"starting Triton at preset {preset} …")
    with serving(preset, **deployment) as server:
        yield server


def table(title: str, *columns: str) -> Table:
    """An empty table; all columns but the first hold figures."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def finish(shown: Table | Sequence[Table], figures: Mapping) -> None:
    """Print the result: its tables, then all figures as one JSON object on the last line."""
    for one in [shown] if isinstance(shown, Table) else shown:
        out.print(one)
    sys.stdout.flush()
    print(json.dumps({name: _plain(value) for name, value in figures.items()}, allow_nan=False), flush=True)


def _plain(value):
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    value = value.item() if hasattr(value, "item") else value  # numpy's and torch's numbers
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    return value


def counts(server: TritonServer) -> dict[str, StageStatistics]:
    """Triton's counts for every model since it was loaded."""
    with contextlib.closing(StatisticsReader(server.url)) as reader:
        return {stage.stage: stage for stage in reader.snapshot()}


def counts_since(server: TritonServer, before: Mapping[str, StageStatistics]) -> dict[str, StageStatistics]:
    return {stage.stage: stage for stage in difference(counts(server).values(), before.values())}


def request(name: str, frames: int, script: str = "Speaker 1: Hello there.", voices=(0,), **more) -> Request:
    """A request of ``frames`` frames; ``more`` are fields of ``Request``."""
    return Request(name, "benchmark", script, tuple(voices), frames, due_ns=time.monotonic_ns(), **more)


def frame_ms(result: Result) -> float:
    """Mean milliseconds between two frames of a stream, whatever the number of frames per response."""
    received, samples = result.chunks.received_ns, result.chunks.samples
    return float((received[-1] - received[0]) / 1e6 * wire.SAMPLES_PER_FRAME / max(1, samples[1:].sum()))


def leave_after(frames: int) -> Callable:
    """An ``on_chunk`` for ``SpeechClient.open`` with which the client leaves after this many frames; 0 = it stays."""
    heard = 0

    def on_chunk(stream, at_ns: int, samples: int) -> None:
        nonlocal heard
        before, heard = heard, heard + samples // wire.SAMPLES_PER_FRAME
        if before < frames <= heard:
            stream.stop(Outcome.CANCELLED)

    return on_chunk


def processes(server: TritonServer) -> dict[str, list[psutil.Process]]:
    """The server's processes: "tritonserver", and by model the instances."""
    main = psutil.Process(server.pid)
    found = {SERVER: [main]}
    for one in main.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(one.cmdline())
            model = next((name for name in server.deployment.models if f"/{name}/" in command), None)
            if model:
                found.setdefault(model, []).append(one)
    return found


def memory_mib(server: TritonServer) -> dict[str, float]:
    """MiB of private memory of each of the server's processes, and of the memory that they share to pass tensors."""
    memory = _sums(server, lambda one: _resident_alone(one) / 2**20)
    regions = Path("/dev/shm").glob(f"{server.shm_prefix}*")
    return {**memory, SHARED: sum(region.stat().st_blocks * 512 for region in regions) / 2**20}


def page(metrics_url: str) -> dict[str, float]:
    """The values of a server's Prometheus page, summed over their labels. Raises OSError where it cannot be read."""
    found: dict[str, float] = {}
    with urllib.request.urlopen(metrics_url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    for sample in (sample for family in families for sample in family.samples):
        found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def held(metrics_url: str) -> dict[str, float]:
    """The sessions, queued requests and bytes of KV cache that a server's page tells of. Raises as ``page``."""
    told = page(metrics_url)
    return {metric.name: told.get(metric.name, 0.0) for metric in (SESSIONS, QUEUE_LENGTH, STAGE_SESSIONS, KV_PROMISED)}


def cpu_seconds(server: TritonServer) -> dict[str, float]:
    """CPU seconds that each of the server's processes has used since it started."""
    return _sums(server, lambda one: sum(one.cpu_times()[:2]))


def _resident_alone(one: psutil.Process) -> int:
    memory = one.memory_info()
    return memory.rss - memory.shared


def _sums(server: TritonServer, measure: Callable[[psutil.Process], float]) -> dict[str, float]:
    sums = {}
    for name, members in processes(server).items():
        with contextlib.suppress(psutil.NoSuchProcess):
            sums[name] = sum(measure(one) for one in members)
    return sums
