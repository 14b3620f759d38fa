"""What the commands print: progress of long work, and answers as tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich import box
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from harness import signoff as job
from harness.records.fit import Fit, FittedStep, Unfitted, fitted
from harness.records.plan import Plan
from harness.records.prediction import Prediction
from harness.records.why_not import RuledOut
from harness.report import words
from harness.report.ruled_out import lost_options
from harness.report.screen import Screen
from harness.topology import Knobs

out = Screen()


class Show(job.Watcher):
    """Progress on the terminal: a bar with the time left, or plain lines where it is not a terminal."""

    def __init__(self):
        columns = (
            SpinnerColumn(), BarColumn(24), TextColumn("{task.fields[left]}"), TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=out, transient=True) if out.is_terminal else None
        self.task: TaskID | None = None
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
        if self.bar and self.task is not None:
            self.bar.update(self.task, description=what, completed=self.spent, left=left)
        else:
            out.print(f"[{self._clock()}] {what} … ({left})", markup=False, soft_wrap=True)

    def done(self, note: str = "") -> None:
        self.finish(self.what, self.current, time.monotonic() - self.step_began, note)

    def finish(self, what: str, estimated_s: float, took_s: float, note: str) -> None:
        self.spent = min(self.spent + estimated_s, self.total)
        out.print(f"[{self._clock()}] {what}: {took_s:.0f} s {note}", markup=False, soft_wrap=True)
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=self.spent, left=self._left())

    def say(self, note: str) -> None:
        out.print(f"[{self._clock()}] {note}", markup=False, soft_wrap=True)

    def _left(self) -> str:
        left_s = max(self.total - self.spent, 0)
        return f"about {left_s / 60:.0f} min left" if left_s > 90 else f"about {left_s:.0f} s left"

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self.began)
        return f"{seconds // 60:2d}:{seconds % 60:02d}"


def print_plan(content: Plan) -> None:
    """Print the answer as a table; rows say what is extrapolated or emulated."""
    label = {"met": "green", "missed": "red"}.get(content.verdict, "yellow")
    out.print(f"\nVerdict: [bold {label}]{content.verdict}[/]", highlight=False)
    for reason in content.reasons:
        out.print(Padding(Text(f"- {words.metric(reason)}"), (0, 0, 0, 2)))
    out.print(_targets_table(content))
    for line in _bounds(content):
        out.print(line, markup=False, highlight=False)
    if content.emulated:
        slower = "" if content.dilation == 1 else f", and time was dilated {content.dilation:g} times"
        out.print(f"Stage times were emulated{slower}: every figure is for the profile's device", style="yellow")
    lost = why_not_table(content.why_not, content.deployment)
    further = _losses_table, _sensitivity_table, _types_table, _forecast_table
    for table in (lost, *(make(content) for make in further)):
        if table.row_count:
            out.print()
            out.print(table)
    out.print()
    for line in _in_a_line(content):
        out.print(line, highlight=False)


def _bounds(content: Plan) -> Iterator[str]:
    """What bounds each count, what utilisation is a share of, and what the counts assume."""
    rates: dict[str, list[str]] = {}
    for row in content.targets:
        rates.setdefault(words.bound(row), []).append(f"{row.qps:g}")
    yield from (f"Bound at {', '.join(alike)} req/s by: {said}" for said, alike in rates.items())
    yield from filter(None, [words.utilisation(content), words.routing(content), words.ladders(content)])


def _in_a_line(content: Plan) -> Iterator[str]:
    """The drain and the memory of a device, if known, and why there is no mix of types."""
    if content.mixed_fleets and content.mixed_fleets.note:
        yield content.mixed_fleets.note
    if drain := content.drain:
        yield (
            f"A draining device with {drain.sessions} sessions is empty after {drain.p50_s:.0f} s (p95 "
            f"{drain.p95_s:.0f} s; {drain.longest_s:.0f} s if the longest has just begun; simulated)"
        )
    if memory := content.memory:
        yield (
            f"KV memory of a device holds {memory.sessions:,.0f} sessions of this mix, "
            f"{memory.longest_sessions:,.0f} of its longest (computed)"
        )


def bare_table(title: str, *columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _targets_table(content: Plan) -> Table:
    interval, priced = f"{words.level(content.confidence)} interval", content.costs
    gpus = content.gpus_per_device
    columns = ["req/s", "devices", *(["GPUs"] if gpus > 1 else []), interval, "utilisation", "N+1", "N+2"]
    columns += [f"{priced.currency} per audio hour"] if priced else []
    table = bare_table(f"One device = {content.unit}", *columns, "basis", left=("basis",))
    for row in content.targets:
        low, high = row.interval or (None, None)
        cost = [f"{row.cost_per_audio_hour:.3g}" if row.devices else "-"] if priced else []
        basis = f"{row.basis or '-'}{', emulated' if content.emulated and row.basis else ''}"
        table.add_row(
            f"{row.qps:g}", _count(row.devices),
            *([_count(row.devices and row.devices * gpus)] if gpus > 1 else []),
            f"{_count(low)} to {_count(high)}", _percent(row.utilisation),
            _count(row.devices_n_plus_1), _count(row.devices_n_plus_2),
            *cost, basis,
        )  # fmt: skip
    return table


def _losses_table(content: Plan) -> Table:
    lost = [(row, loss) for row in content.targets for loss in row.losses if loss.devices == row.devices]
    judged_s = [loss.judged_s for _, loss in lost if loss.judged_s is not None]
    watched = f"; judged over {words.duration(min(judged_s))} or more" if judged_s else ""
    columns = "req/s", "lost", "SLOs", "nearest limit", "of this limit", "sessions moved", "basis"
    table = bare_table(f"Devices lost at the peak, without spares{watched}", *columns, left=("nearest limit", "basis"))
    for row, loss in lost:
        share = loss.worst_share
        table.add_row(
            f"{row.qps:g}", f"{loss.lost} of {loss.devices}", "met" if loss.met else "violated",
            words.metric_briefly(loss.worst), "over 10x" if share is None or share > 10 else _percent(share),
            str(loss.interrupted), loss.basis,
        )  # fmt: skip
    return table


def _sensitivity_table(content: Plan) -> Table:
    rates = [f"at {row.qps:g}/s" for row in content.targets]
    columns = "change", *rates, "req/s planned for one alone", "basis"
    table = bare_table("What changes would do: devices", *columns, left=("change", "basis"))
    for row in content.sensitivity:
        devices = (_count(each.devices) for each in row.targets)
        table.add_row(row.change, *devices, _rate(row.rate_per_device), row.basis or "not known")
    known = {row.change: row.note for row in content.sensitivity if row.note}
    notes = {note: [change for change in known if known[change] == note] for note in known.values()}
    if notes:
        table.caption = "\n".join(f"{', '.join(changes)}: {note}" for note, changes in notes.items())
    return table


def _types_table(content: Plan) -> Table:
    rates = [f"at {row.qps:g}/s" for row in content.targets]
    currency = f"{content.costs.currency} per audio" if content.costs else "cost of an audio"
    columns = "type", *rates, "req/s planned for one alone", "KV sessions", f"{currency} hour at the highest target"
    table = bare_table("Other devices, by their profiles: devices (extrapolated)", *columns, left=("type",))
    for row in content.device_types:
        devices = [_count(each.devices) for each in row.targets] or ["-"] * len(rates)
        cost = row.targets[-1].cost_per_audio_hour if row.targets else None
        sessions = "-" if row.kv_sessions is None else f"{row.kv_sessions:.0f}"
        price = "-" if cost is None else f"{cost:.3g}"
        kind = f"{row.type} at {row.preset}{f' ({row.basis})' if row.basis != 'extrapolated' else ''}"
        table.add_row(kind, *devices, _rate(row.rate_per_device), sessions, price)
    return table


def _forecast_table(content: Plan) -> Table:
    """Tables of growth: months until counts are too small, and counts of later months."""
    found = content.forecast
    if found is None:
        return bare_table("Growth")
    after = list(found.targets[0].devices_after_months) if found.targets else []
    fleet = [f"months until {found.fleet} are too few"] if found.fleet else []
    columns = ["req/s today", "months until too few", "months with a spare (N+1)", *fleet]
    columns += [f"devices in {n} months" for n in after]
    table = bare_table(f"Growth of {found.growth_per_month:.0%} a month (extrapolated)", *columns)
    for row in found.targets:
        lasts = [row.months_until_too_small, row.months_until_too_small_n_plus_1]
        lasts += [row.months_until_fleet_too_small] if fleet else []
        then = (words.devices_then(count, found.most_devices) for count in row.devices_after_months.values())
        table.add_row(f"{row.qps:g}", *map(_months, lasts), *then)
    return table


def why_not_table(rows: Sequence[RuledOut], planned: Knobs | None) -> Table:
    """The options that lost, with the limit that ruled each out and by how much."""
    columns = "option", "one device sustains", "judged at", "limit", "value", "off by", "finding", "basis"
    table = bare_table("Why not another option", *columns, left=("option", "judged at", "limit", "finding", "basis"))
    for row in lost_options(rows, planned):
        table.add_row(row.option, row.sustains, row.at, row.limit, row.value, row.excess, row.sure, row.basis or "-")
    return table


def print_fit(content: Fit) -> None:
    """Print the fit of each deployment: its step time and the rate that one device sustains."""
    columns = "deployment", "step time", "R²", "req/s of one alone", "bound by"
    table = bare_table(f"One device = {content.unit}", *columns, left=("deployment", "step time", "bound by"))
    names = words.name_deployments([each.deployment for each in content.deployments])
    for number, (each, name) in enumerate(zip(content.deployments, names, strict=True)):
        line, r_squared = _step_words(each.step_time)
        table.add_row(
            f"{name} (best)" if number == content.best else name, line, r_squared, _rate(each.max_rate_per_s, 3),
            words.constraint(each.binding) if each.binding else words.metric(each.inconclusive),
        )  # fmt: skip
    out.print(table)


def _step_words(step: FittedStep | Unfitted) -> tuple[str, str]:
    """The line of a step time, or why there is none; and its R²."""
    if isinstance(step, Unfitted):
        return step.inconclusive, "-"
    return f"{1e3 * step.intercept_s:.1f} ms + {1e3 * step.slope_s:.2f} ms x sessions", f"{step.r_squared:.3f}"


def print_prediction(prediction: Prediction, unit: str) -> None:
    """Print a simulated steady state: the load, the quantiles of each class, and whether that load was measured."""
    out.print(
        f"Simulated at {prediction.rate_per_s:g} requests/s on {unit}: {prediction.sessions:.1f} sessions at once, "
        f"{1e3 * prediction.step_s:.1f} ms a frame, {prediction.frames_per_s / 7.5:.1f} audio seconds per second",
        highlight=False,
    )
    most, model = prediction.sessions_p95, prediction.model
    measured = fitted(model.step_time).max_sessions if model else None
    if most is not None and measured is not None and most > round(measured):
        out.print(
            f"extrapolated: up to {most:.0f} sessions at once (95th percentile), and {measured:.0f} were measured",
            style="yellow",
        )
    table = bare_table("", "class", "first audio p50", "first audio p95", "RTF p50", "RTF p95", left=("class",))
    for name, own in prediction.classes.items():
        audio = map(words.milliseconds, (own.ttfa_p50_s, own.ttfa_p95_s))
        table.add_row(name, *audio, *map(words.figure, (own.rtf_p50, own.rtf_p95)))
    table.caption = "RTF (real-time factor): seconds of making per second of audio; above 1 a stream falls behind"
    out.print(table)


def _count(value) -> str:
    return "-" if value is None else f"{value:g}"


def _rate(value, decimals: int = 2) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _months(value) -> str:
    return "never" if value is None else f"{value:.1f}"


def _percent(value) -> str:
    return "-" if value is None else f"{value:.0%}"
