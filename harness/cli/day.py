"""The command ``day``: static and elastic fleets over a varying demand, from a run's stored fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from harness.cli.app import RunFolder, app, opened, out
from harness.errors import InconclusiveError, InputError

if TYPE_CHECKING:
    from harness.planfile.sections import DemandSpec
    from harness.records.day import Day
    from harness.records.plan import Plan
    from harness.records.schema import RunManifest


@app.command(
    epilog="Examples: `harness day --run results/quick-1a2b3c4d --peak 5 --trough 1`, "
    "`harness day --run results/quick-1a2b3c4d --trace arrivals.csv --hours 24 --mean 2 --page day.html`"
)
def day(
    run: RunFolder,
    peak: Annotated[float | None, typer.Option("--peak", help="Highest rate of a day, requests/s.")] = None,
    trough: Annotated[float | None, typer.Option("--trough", help="Lowest rate of a day, requests/s.")] = None,
    peak_hour: Annotated[float, typer.Option("--peak-hour", help="Hour of the highest rate, 0 to 24.")] = 20.0,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Arrivals whose rates are the demand instead: a CSV file.")
    ] = None,
    hours: Annotated[float | None, typer.Option("--hours", help="Stretch the trace to so many hours.")] = None,
    mean: Annotated[float | None, typer.Option("--mean", help="Scale the trace's rates to this mean.")] = None,
    start: Annotated[
        float | None, typer.Option("--start-seconds", help="From the wish for a device until it serves; default: 300.")
    ] = None,
    minimum: Annotated[int | None, typer.Option("--minimum", help="Fewest devices; default: 1.")] = None,
    maximum: Annotated[
        int | None, typer.Option("--maximum", help="Most devices; default: twice those that the peak needs.")
    ] = None,
    target: Annotated[
        float | None, typer.Option("--target-sessions", help="Sessions per device to hold; default: planned.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", help="Write a page with the picture to this file.")] = None,
) -> None:
    """Compare a static fleet with reactive and predictive autoscaling over a day: GPU hours, cost, SLO attainment.

    The demand is that of the run's plan file (key demand), or the one given here. Everything is simulated from the
    stored fit, with a start-up time and drains as long as the sessions last. The rule that is simulated is stored
    as Kubernetes evaluates it: see Demand over a day, and mixed fleets, in the documentation. Exit code 2 where no
    number of devices meets the SLOs at the peak.
    """
    from harness import exit_codes
    from harness.records.store import replace_text
    from harness.report.day_page import render
    from harness.runs import analysis, opening

    stored = opened(run)
    spec, fit = opening.spec_of(stored), stored.fit()
    if fit is None:
        raise InputError(f"{run} holds no fit yet: run `harness fit --run {run}` first")
    rule = {"start_seconds": start, "minimum": minimum, "maximum": maximum, "target_sessions": target}
    asked, is_new = _asked(peak, trough, peak_hour, trace, hours, mean, rule, spec.demand)
    curve = asked.curve(Path()) if is_new else stored.manifest.demand
    plan = stored.plan() or analysis.plan_of(stored, spec, fit, spec.targets_qps)
    found = analysis.day_of(stored.manifest, spec, fit, plan, asked, curve, lambda what: out.print(f"{what} …"))
    if found is None:
        raise InconclusiveError(f"{run} has no deployment that meets the SLOs at any rate: there is nothing to plan")
    print_day(found, times_of(stored.manifest, plan))
    if page:
        replace_text(page, render(found, stored.manifest, plan))
        out.print(f"Page: [bold]{page}[/]", soft_wrap=True)
    raise typer.Exit(exit_codes.MET if found.policies else exit_codes.INCONCLUSIVE)


def _asked(
    peak: float | None,
    trough: float | None,
    peak_hour: float,
    trace: Path | None,
    hours: float | None,
    mean: float | None,
    rule: dict[str, Any],
    planned: DemandSpec | None,
) -> tuple[DemandSpec, bool]:
    """The demand that options describe, otherwise that of the plan with their rule; and whether it is a new one."""
    from harness.planfile.sections import DemandSpec

    given: dict[str, Any] = {name: value for name, value in rule.items() if value is not None}
    demand: dict[str, Any] = {}
    if peak is not None:
        demand["diurnal"] = {"peak_qps": peak, "trough_qps": 0.0 if trough is None else trough, "peak_hour": peak_hour}
    if trace is not None:
        demand["trace"] = {"file": str(trace), "hours": hours, "mean_qps": mean}
    if trace is None and (hours is not None or mean is not None):
        raise InputError("--hours and --mean are for --trace: give a file of arrivals, or leave them out")
    if peak is None and trough is not None:
        raise InputError("--trough needs --peak: give both, such as --peak 5 --trough 1")
    if not demand and planned is None:
        raise InputError("the run's plan has no demand: give --peak 5 --trough 1, or --trace FILE")
    kept = planned.model_dump() if planned else {}
    kept = {name: value for name, value in kept.items() if not demand or name not in ("diurnal", "trace")}
    try:
        return DemandSpec.model_validate({**kept, **demand, **given}), bool(demand)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"the demand: {f'{where}: ' if where else ''}{first['msg']}: change that option") from None


def times_of(manifest: RunManifest, plan: Plan | None) -> str:
    """What is to be said of times that are not a real device's, such as "emulated, time dilated 4 times, estimated"."""
    from harness.report import decision

    if not decision.is_emulated(manifest, plan):
        return ""
    return ", ".join(filter(None, (decision.how_emulated(manifest), manifest.times_basis)))


def print_day(found: Day, times: str = "") -> None:
    """Print a day: the fleets of each policy, and the rules. ``times``: see ``times_of``."""
    from harness.report import words

    out.print(f"\nDemand: {found.source}; {found.mean_qps:.4g} requests/s on average", markup=False, soft_wrap=True)
    if not found.policies:
        out.print(found.note, style="yellow")
        return
    out.print(_table(found, times))
    for each in found.policies:
        if each.rule:
            out.print(f"{each.policy}: {words.scaling_rule(each.rule)}", markup=False, soft_wrap=True)
    out.print(found.note, soft_wrap=True)


def _table(found: Day, times: str) -> Table:
    from harness.report import words
    from harness.report.day_figures import saving

    hours = "GPU hours" if found.gpus_per_device > 1 else "device hours"
    columns = ["SLOs", "within all", f"worst {words.part_of(found.period_s)}", "rejected", "most devices", hours]
    columns += [found.currency] if found.currency else []
    basis = ", ".join(filter(None, ("simulated", times)))
    title = f"{found.requests:,} requests in {found.period_s / 3600:g} h under each policy ({basis})"
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for name in [*columns, "against static", "basis"]:
        table.add_column(name, justify="left" if name in ("SLOs", "basis") else "right")
    for each in found.policies:
        shares = [words.percent(share, 2) for share in (each.within_slos, each.worst_part, each.rejected)]
        paid = f"{each.device_hours * found.gpus_per_device:,.1f}"
        cost = [words.fixed(each.cost, 2)] if found.currency else []
        met = {True: "met", False: "violated", None: "not known"}[each.met]
        against = saving(found, each.policy) or "-"
        table.add_row(
            each.policy,
            met,
            *shares,
            f"{each.most_devices:.4g}",
            paid,
            *cost,
            against,
            ", ".join(filter(None, (each.basis, times))),
        )
    return table
