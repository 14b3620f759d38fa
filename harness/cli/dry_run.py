"""``harness signoff --dry-run``: what a plan's windows are expected to hold, and what its SLOs need of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import exit_codes
from harness.cli.app import out

if TYPE_CHECKING:
    from rich.table import Table

    from harness.sweep.outlook import PlanOutlook


def dry_run(plan_path: Path, changes: dict[str, Any]) -> int:
    """Print what a sign-off of the plan can decide, and return the exit code: 2 where it cannot conclude.

    ``changes``: as for ``deployed_as``. Nothing is started, measured or written.
    """
    from harness.planfile.reading import deployed_as, load_plan
    from harness.runs.rungs import sessions_that_fit, within_room
    from harness.sweep.outlook import PlanOutlook

    spec, clipped = within_room(deployed_as(load_plan(plan_path), **changes))
    found = PlanOutlook.of_plan(spec, sessions_that_fit(spec))
    if clipped:
        _say(f"warning: {clipped}", "yellow")
    _say(_server(found))
    out.print(_table(found))
    for line in _times(found):
        _say(line)
    problems, doubts = found.problems(), found.doubts()
    for problem in problems:
        _say(f"{plan_path}: {problem}", "red")
    for doubt in doubts:
        _say(f"warning: {plan_path}: {doubt}", "yellow")
    if not problems:
        is_sure = found.window and not doubts
        _say("The plan can conclude" if is_sure else "Nothing rules out that the plan concludes", "green")
    return exit_codes.INCONCLUSIVE if problems else exit_codes.MET


def _say(text: str, style: str = "") -> None:
    out.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)


def _server(found: PlanOutlook) -> str:
    from harness.report import words

    if found.server is None:
        return f"The rate of a server is not known before a ladder is measured: {found.unknown}"
    said = "Expected of a server, by the profile of the emulated GPU (estimated):"
    if found.window is None:
        first = "" if found.server.of_all else " with the first value of each knob"
        return f"{said} no rate meets the SLOs{first}, by {words.metric(found.server.binding)}: nothing to confirm"
    share = max(found.spec.confirm.load_share)
    return (
        f"{said} {found.server.rate_per_s:.2g} requests/s; confirmed at {share:.0%} of that, "
        f"{found.window.rate_per_s:.2g} requests/s"
    )


def _table(found: PlanOutlook) -> Table:
    """Each SLO: the requests that a window holds, those that decide it, and the rate from which the plan has them."""
    from harness.cli.tables import bare_table
    from harness.report import words
    from harness.sweep.budget import MOST_LONGER
    from harness.sweep.outlook import WindowOutlook

    spec, mix = found.spec, found.spec.traffic_mix()
    longest_s = MOST_LONGER * spec.confirm.seconds
    columns = "SLO", "window", "requests expected", "needed", "decided in", "decided from"
    table = bare_table("Windows (estimated)", *columns, left=("SLO", "window"))
    for each in found.ladder:
        table.add_row(
            words.metric(str(each.slo)), f"rungs of {spec.ladder.seconds:g} s", f"{each.expected:.0f}",
            str(each.needed), "-", "-",
        )  # fmt: skip
    shown = found.window or WindowOutlook.of(spec, mix, 1.0)
    for each in shown.slos:
        rate = shown.rate_per_s * each.share_in(longest_s) / max(spec.confirm.load_share)
        expected = f"{each.expected:.0f}" if found.window else "not known" if found.server is None else "-"
        seconds = f"{each.seconds:,.0f} s" if found.window else "-"
        window = f"confirmation, {shown.seconds if found.window else longest_s:g} s"
        table.add_row(
            words.metric(str(each.slo)), window, expected, str(each.needed), seconds, f"{rate:.2g} requests/s"
        )
    table.caption = (
        f"needed: requests within the limit that decide an SLO at {words.level(spec.confidence)} confidence, or that a "
        "fit needs of a ladder. One decided SLO confirms a run. decided from: a server that sustains so much, with the "
        f"longest window, {MOST_LONGER} times confirm.seconds"
    )
    return table


def _times(found: PlanOutlook) -> list[str]:
    from harness.clock import AUTO

    minutes, budget = found.least_s / 60, found.spec.budget_minutes
    if found.spec.dilate == AUTO:
        return [
            f"What an answer needs takes about {minutes:.0f} min undilated; budget_minutes {budget:g} suffices up to a "
            f"time dilation of {max(found.most_dilation, 0):.2g}"
        ]
    return [f"What an answer needs takes about {minutes:.0f} min, of budget_minutes {budget:g}"]
