"""What the commands print: progress of long work, and answers as tables."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from harness import runs
from harness import signoff as job

out = Console()


class Show(job.Watcher):
    """Progress on the terminal: a bar with the time left, or plain lines where it is not a terminal."""

    def __init__(self):
        columns = (
            SpinnerColumn(), BarColumn(24), TextColumn("{task.fields[left]}"), TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=out, transient=True) if out.is_terminal else None
        self.task = None
        self.spent = self.total = self.current = 0.0
        self.began = time.monotonic()

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def begin(self, total_s: float) -> None:
        self.total = total_s
        if self.bar:
            self.task = self.bar.add_task("", total=total_s, left="")
        out.print(f"about {total_s / 60:.0f} minutes")

    def step(self, what: str, estimated_s: float) -> None:
        self.what, self.current, self.step_began = what, estimated_s, time.monotonic()
        left = self._left()
        if self.bar:
            self.bar.update(self.task, description=what, completed=self.spent, left=left)
        else:
            out.print(f"[{self._clock()}] {what} … ({left})", markup=False, soft_wrap=True)

    def done(self, note: str = "") -> None:
        self.spent = min(self.spent + self.current, self.total)
        took = time.monotonic() - self.step_began
        out.print(f"[{self._clock()}] {self.what}: {took:.0f} s {note}", markup=False, soft_wrap=True)
        if self.bar:
            self.bar.update(self.task, completed=self.spent)

    def say(self, note: str) -> None:
        out.print(f"[{self._clock()}] {note}", markup=False, soft_wrap=True)

    def _left(self) -> str:
        left_s = max(self.total - self.spent, 0)
        return f"about {left_s / 60:.0f} min left" if left_s > 90 else f"about {left_s:.0f} s left"

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self.began)
        return f"{seconds // 60:2d}:{seconds % 60:02d}"


def print_plan(content: dict) -> None:
    """The answer as a table; what is extrapolated or emulated is said in its row."""
    label = {"met": "green", "missed": "red", "inconclusive": "yellow"}[content["verdict"]]
    out.print(f"\nVerdict: [bold {label}]{content['verdict']}[/]", highlight=False)
    for reason in content["reasons"]:
        out.print(f"  - {reason}", soft_wrap=True, markup=False)
    table = Table(title=f"One device = {content['unit']}", title_justify="left")
    interval = f"{content['confidence']:.0%} interval"
    for name in ("requests/s", "devices", interval, "bound by", "busy", "N+1", "basis"):
        table.add_column(name, justify="left" if name in ("bound by", "basis") else "right", no_wrap=name != "bound by")
    for row in content["targets"]:
        low, high = row["interval"] or (None, None)
        table.add_row(
            f"{row['qps']:g}", _count(row["devices"]), f"{_count(low)} to {_count(high)}", row["binding"] or "-",
            _percent(row["utilisation"]), _count(row["devices_n_plus_1"]), row["basis"] or "-",
        )  # fmt: skip
    out.print(table)


def print_fit(content: dict) -> None:
    """What the fit says of each deployment: the step time and the rate that one device carries."""
    table = Table(title=f"One device = {content['unit']}", title_justify="left")
    for name in ("deployment", "step time", "R²", "highest rate", "bound by"):
        table.add_column(name)
    for number, each in enumerate(content["deployments"]):
        step = each["step_time"]
        line = step["inconclusive"] or f"{1e3 * step['intercept_s']:.1f} ms + {1e3 * step['slope_s']:.2f} ms x sessions"
        rate = each["max_rate_per_s"]
        mark = " *" if number == content["best"] else ""
        table.add_row(
            runs.describe_point(each["deployment"]) + mark, line,
            "-" if step["inconclusive"] else f"{step['r_squared']:.3f}",
            "-" if rate is None else f"{rate:.3f}/s", each["binding"] or each["inconclusive"] or "-",
        )  # fmt: skip
    out.print(table)


def print_prediction(content: dict, unit: str) -> None:
    """A simulated steady state: the load, and the quantiles of each class."""
    out.print(
        f"Simulated at {content['rate_per_s']:g} requests/s on {unit}: {content['sessions']:.1f} sessions at once, "
        f"{1e3 * content['step_s']:.1f} ms a frame, {content['frames_per_s'] / 7.5:.1f} audio seconds per second",
        soft_wrap=True,
        highlight=False,
    )
    table = Table("class", "first audio p50", "p95", "RTF p50", "p95")
    for name in dict.fromkeys(key.partition(".")[0] for key in content if "." in key):
        values = [content[f"{name}.{key}"] for key in ("ttfa_p50_s", "ttfa_p95_s", "rtf_p50", "rtf_p95")]
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    out.print(table)


def _count(value) -> str:
    return "-" if value is None else f"{value:g}"


def _percent(value) -> str:
    return "-" if value is None else f"{value:.0%}"
