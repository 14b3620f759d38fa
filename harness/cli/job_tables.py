"""Prints fleets for streams, for tasks, and for both."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from harness.capacity.planning.job_fleets import BOTH, STREAMS, TASKS, FleetLoad, SharedPlan
from harness.cli.app import out
from harness.report import words

_NAMES = {STREAMS: "streams alone", TASKS: "tasks alone", BOTH: "both on one fleet"}


def print_shared(plans: Sequence[SharedPlan], unit: str, level: str, times: str) -> None:
    """Print the fleets for each peak rate, and what one fleet saves. ``times``: see ``cli.day.times_of``."""
    for plan in plans:
        out.print()
        out.print(_table(plan, unit, level, times))
        for line in _lines(plan):
            out.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(plan: SharedPlan, unit: str, level: str, times: str) -> Table:
    basis = ", ".join(filter(None, ("extrapolated" if plan.extrapolated else "simulated", times)))
    title = f"Streams at most {plan.qps:g} a second, and tasks ({basis}); one device = {unit}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("fleet")
    for name in ("devices", f"{level} interval", "--sessions", "turnaround"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for kind, name in _NAMES.items():
        table.add_row(name, *_row(plan, kind))
    return table


def _row(plan: SharedPlan, kind: str) -> tuple[str, ...]:
    load = plan.loads.get(kind)
    if load is None:
        return "-", "-", "-", "-", "no number of devices meets the SLOs"
    sessions = "-" if kind == STREAMS else str(load.sessions)
    interval = words.interval(plan.intervals[kind])
    return str(load.devices), interval, sessions, _turnarounds(load), words.metric(load.binding)


def _turnarounds(load: FleetLoad) -> str:
    shown = (f"p{slo.quantile * 100:g} {slo.shown(value)}" for slo, value in load.turnarounds.items())
    return ", ".join(shown) or "-"


def _lines(plan: SharedPlan) -> list[str]:
    """What one fleet saves, and how the studio is told."""
    if plan.saved is None or plan.two_fleets is None or plan.saved_interval is None:
        return ["Two fleets and one cannot be compared: an SLO is met by no number of devices."]
    low, high = plan.saved_interval
    load, two = plan.loads[BOTH], plan.two_fleets
    interval = "" if low == high else f" ({low} to {high})"
    if low is None:
        interval = " (interval not known: of the slowest likely devices no number suffices)"
    needs = f"One fleet needs {load.devices} device{'s' * (load.devices > 1)}, two fleets {two}"
    saves = f"{plan.saved} fewer" if plan.saved > 0 else "it saves nothing"
    first = f"{needs}: {saves}{interval}."
    return [first, f"Run the studio with --sessions {load.sessions}: tasks then get what streams leave of them."]
