"""Commands that answer from stored results: fit, plan, simulate, report, compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from harness import exit_codes, wire
from harness.cli.app import TOPOLOGY_HELP, RunFolder, app, opened, out, rates_of, say_aside
from harness.cli.cards import CardsFile, plan_for_cards
from harness.cli.day import print_day, times_of
from harness.errors import InputError


@app.command(epilog="Example: `harness fit --run results/quick-1a2b3c4d`")
def fit(run: RunFolder) -> None:
    """Fit the capacity models again from a run's stored trials, and print them.

    For a signed run the fit is only printed: its stored one is part of what was signed.
    """
    from harness.cli.tables import print_fit
    from harness.report.facts import is_signed
    from harness.runs import analysis

    stored = opened(run)
    signed = stored.manifest.sealed or is_signed(stored)
    with stored.lock():
        content = analysis.fit_of(stored)
        if not signed:
            stored.write_fit(content)
    print_fit(content)
    if signed:
        out.print("The run is signed: its stored fit.json is unchanged", soft_wrap=True)


@app.command(
    epilog="Examples: `harness plan --run results/quick-1a2b3c4d --qps 0.5,1,5,20`, "
    "`harness plan --card h100,l40s --qps 1,10 --price h100=2.5,l40s=1`, "
    "`harness plan --run results/quick-1a2b3c4d --qps 1 --jobs scenarios/mixes/tasks.yaml`"
)
def plan(
    run: Annotated[Path | None, typer.Option("--run", help="A folder under results/.")] = None,
    qps: Annotated[str, typer.Option("--qps", help="Target rates, comma-separated; default: the plan's own.")] = "",
    card: Annotated[
        str, typer.Option("--card", help="Estimate for these cards instead, comma-separated: see `harness cards`.")
    ] = "",
    preset: Annotated[str, typer.Option(help="With --card: tiny, 1.5b or 7b.")] = "1.5b",
    topology: Annotated[str, typer.Option(help=f"With --card: {TOPOLOGY_HELP}.")] = wire.FUSED,
    mix: Annotated[
        str, typer.Option(help="With --card: a mix or its file; default: 95% of 10 s and 5% of 90 minutes.")
    ] = "",
    slo: Annotated[
        str, typer.Option(help="With --card: SLOs of every class, p95 of first audio (s) and of RTF: 1.0,0.9")
    ] = "",
    measured: Annotated[
        Path | None, typer.Option("--from", metavar="PROFILE", help="With --card: a measured profile of another card.")
    ] = None,
    cards: CardsFile = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="With --card: write estimate.html and estimate.json to this folder.")
    ] = None,
    price: Annotated[
        str, typer.Option("--price", help="With --card: price of an hour of each, for costs: h100=2.5,l40s=1.")
    ] = "",
    currency: Annotated[str, typer.Option(help="With --card: of the prices.")] = "USD",
    jobs: Annotated[
        Path | None,
        typer.Option("--jobs", metavar="FILE", help="With --run: tasks beside the streams, and devices for both."),
    ] = None,
    accept: Annotated[
        bool,
        typer.Option("--accept-estimates", help="With --card or --jobs: exit with 0, although no GPU was measured."),
    ] = False,
) -> None:
    """Print the devices for other target rates from stored results, or estimate them for cards nobody has measured.

    With --card, nothing needs to have been run: the answer is a planning estimate with a wide interval, what of it is
    not known, and the measurement that would narrow it most; with energy, and cost by --price. Exit code 2 then,
    unless it is accepted.

    With --jobs, tasks run beside the streams: devices for streams alone, for tasks alone, and for both on one fleet,
    where tasks fill what the streams leave over a day. Exit code 2 where no number of devices meets the SLOs of both,
    and for a run whose times nobody measured, or that dilated time, unless estimates are accepted.
    """
    if (run is None) == (not card):
        raise InputError("give either --run DIR, for stored results, or --card h100,l40s, for an estimate")
    if card and jobs:
        raise InputError("--jobs is for --run: what tasks need is simulated from a measured device")
    if card:
        rates = rates_of(qps) or (0.1, 1.0, 10.0)
        chosen = {"preset": preset, "topology": topology, "mix": mix, "slo": slo, "measured": measured, "file": cards}
        raise typer.Exit(plan_for_cards(card, rates, **chosen, costs=(price, currency), folder=folder, accepted=accept))
    if any((mix, slo, measured, cards, folder, price)):
        raise InputError("--mix, --slo, --from, --cards, --out and --price are for --card: leave them out")
    assert run is not None
    raise typer.Exit(_plan_of_stored(run, qps, jobs, accept))


def _plan_of_stored(run: Path, qps: str, jobs: Path | None, accepted: bool) -> int:
    """Print the plan of a run, or with ``jobs`` the fleets for its streams and for tasks; returns the exit code."""
    if jobs:
        return _shared_plans(run, qps, jobs, accepted)
    if accepted:
        raise InputError("--accept-estimates is for --card and --jobs: leave it out")
    _plan_of_run(run, qps)
    return exit_codes.MET


def _shared_plans(run: Path, qps: str, jobs: Path, accepted: bool) -> int:
    """Print the fleets of each rate, and return the exit code."""
    from harness.capacity.planning.job_fleets import BOTH
    from harness.cli.job_tables import print_shared
    from harness.planfile.jobs import load_jobs
    from harness.report import words
    from harness.runs import analysis, opening

    demand, stored = load_jobs(jobs), opened(run)
    spec = opening.spec_of(stored)
    plans = [analysis.shared_plan_of(stored, demand, rate) for rate in rates_of(qps) or spec.targets_qps]
    times = times_of(stored.manifest, stored.plan())
    print_shared(plans, opening.unit_of(stored.manifest), words.level(spec.confidence), times)
    if not all(BOTH in plan.loads for plan in plans) or (stored.manifest.is_estimate and not accepted):
        return exit_codes.INCONCLUSIVE
    return exit_codes.MET


def _plan_of_run(run: Path, qps: str) -> None:
    from harness.cli.tables import print_plan
    from harness.runs import analysis, opening

    stored = opened(run)
    spec = opening.spec_of(stored)
    content = stored.fit()
    if content is None:
        raise InputError(f"{run} holds no fit yet: run `harness fit --run {run}` first")
    anew = analysis.plan_of(stored, spec, content, rates_of(qps) or spec.targets_qps)
    before = stored.plan()
    if before and before.doubts:  # of the sign-off: what an answer needs was left out, or has no fleet
        anew = replace(anew, verdict="inconclusive", reasons=(*anew.reasons, *before.doubts))
    print_plan(anew)
    if stored.manifest.demand:
        found = before.day if before and before.day else analysis.day_of(stored.manifest, spec, content, anew)
        if found:
            print_day(found, times_of(stored.manifest, anew))


@app.command(epilog="Example: `harness simulate --run results/quick-1a2b3c4d --qps 0.8`")
def simulate(
    run: RunFolder,
    qps: Annotated[float, typer.Option("--qps", help="Requests per second on one device, Poisson.")],
) -> None:
    """Predict one device of the best deployment at a rate: simulated from stored fits, nothing is measured."""
    from harness.cli.tables import print_prediction
    from harness.runs import analysis, opening

    stored = opened(run)
    print_prediction(analysis.simulation_of(stored, rates_of(str(qps))[0]), opening.unit_of(stored.manifest))


@app.command(epilog="Example: `harness report --run results/quick-1a2b3c4d`")
def report(
    run: RunFolder,
    pdf: Annotated[bool, typer.Option("--pdf", help="Print signoff.pdf too, by an installed Chromium.")] = False,
) -> None:
    """Write signoff.html and sweep.html again from a run's stored records; signed files must be unchanged.

    Prints why each option that the plan does not use lost: the limit that rules it out, and by how much.
    """
    from harness.cli.tables import why_not_table
    from harness.records.store import Run
    from harness.report.facts import SIGNATURE_NAME, is_signed
    from harness.report.paper import write_pdf
    from harness.report.seal import report_again, seal_of
    from harness.report.sweep_page import write_sweep_report
    from harness.runs.analysis import why_not_of

    stored = Run.open(run)
    with stored.lock():
        before = seal_of(stored)
        path = report_again(stored)
        out.print(f"Sweep: [bold]{write_sweep_report(stored)}[/]", soft_wrap=True)
    plan = stored.plan()
    lost = why_not_table(why_not_of(stored), plan.deployment if plan else None)
    if lost.row_count:
        out.print(lost)
    out.print(f"Report: [bold]{path}[/]", soft_wrap=True)
    if pdf:
        out.print(f"PDF: [bold]{write_pdf(path)}[/]", soft_wrap=True)
    if is_signed(stored):
        out.print("Resealed; only the report hash may have changed", soft_wrap=True)
    if seal_of(stored) != before and (stored.path / SIGNATURE_NAME).exists():
        words = "the page has changed, so the signature is invalid: sign again with `harness signoff PLAN --sign`"
        say_aside(words, "yellow")


@app.command(epilog="Example: `harness compare results/sample-quick results/quick-1a2b3c4d --json`")
def compare(
    a: Annotated[Path, typer.Argument(help="The run to compare with: a folder under results/.")],
    b: Annotated[Path, typer.Argument(help="The run that is judged, of the same preset, mix and SLOs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare run B with run A: step time at equal sessions, SLO metrics, rate and devices per target.

    Each difference has an interval that holds how far repeated ladders, hosts and hours differ; within it, none
    is shown. Exit code 0: no regression is shown; 1: B is worse in some figure; 2: none is, but some figure is not
    known in both runs. Runs of another preset, another mix or with other SLOs cannot be compared (64).
    """
    from harness.cli.compare_tables import print_comparison
    from harness.records.comparison import INCONCLUSIVE, WORSE
    from harness.runs.comparing import compare_runs

    found = compare_runs(opened(a), opened(b))
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, allow_nan=False))
    else:
        print_comparison(found)
    raise typer.Exit({WORSE: exit_codes.WORSE, INCONCLUSIVE: exit_codes.INCONCLUSIVE}.get(found.finding, 0))
