"""Commands that measure: a first plan, a sign-off, a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import exit_codes
from harness.cli.app import SERVERS_HELP, Measured, PlanDilation, PlanTopology, Ray, Results, app, out, say_aside
from harness.cli.server_options import NO_SERVERS, ONE_AT_A_TIME, Servers, with_servers
from harness.clock import dilation_of
from harness.errors import InputError
from harness.host.places import plan_file

if TYPE_CHECKING:
    from harness.records.store import Run

GoOn = Annotated[
    bool,
    typer.Option(
        "--go-on",
        help="Continue a finished run with the measurements that its budget did not allow, then write its hashes anew.",
    ),
]
AcceptEstimates = Annotated[
    bool, typer.Option("--accept-estimates", help="Exit with 0 for a planning estimate: no GPU was measured.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Start nothing: say whether the windows hold enough requests to conclude.")
]
Checked = Annotated[
    Path | None, typer.Option("--check", metavar="DIR", help="Verify the folder of a finished run instead.")
]
Trusted = Annotated[
    Path | None, typer.Option("--trust", metavar="KEY.pub", help="With --check: the key that must have signed it.")
]


@app.command(
    epilog="Example: `harness init plan.yaml --preset 1.5b --gpus 1 --mix mixed --slo 1.0,0.9 --qps 1,5 --yes`"
)
def init(
    path: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="The file to write.")] = Path("plan.yaml"),
    preset: Annotated[str | None, typer.Option(help="Model: tiny, 1.5b or 7b.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Where it runs: cpu, or how many GPUs one server has.")] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="short (10 s), mixed (95% of 10 s, 5% of 90 min), long (90 min), or seconds of audio."),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(help="SLOs: p95 of time to first audio in seconds, and of the real-time factor: 1.0,0.9"),
    ] = None,
    qps: Annotated[str | None, typer.Option(help="Target rates, requests per second, comma-separated.")] = None,
    price: Annotated[str | None, typer.Option(help="Price of an hour of one GPU or host.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: use defaults where no option is given.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a first plan from five answers; options skip the matching question."""
    from harness.cli import first_plan as first

    if path.exists() and not force:  # checked before asking five questions
        raise InputError(f"{path} already exists: give another name, or --force to replace it")
    ask = None if yes else _asked
    chosen_preset = first.answer(
        preset, ask, "1/5 Which preset of the model: tiny, 1.5b or 7b?", "tiny", first.preset_of
    )
    where = first.answer(
        gpus, ask, "2/5 Where does it run: cpu, or on how many GPUs of one server?", "cpu", first.gpus_of
    )
    traffic = first.answer(
        mix, ask, "3/5 Which traffic: short (10 s), mixed (10 s and 90 min), long (90 min), or seconds of your own?",
        "short", first.mix_of,
    )  # fmt: skip
    ttfa_s, rtf = first.answer(
        slo,
        ask,
        "4/5 Which SLOs: p95 of time to first audio (s), p95 of the real-time factor?",
        "1.0, 0.9",
        first.slos_of,
    )
    rates, its_price = first.answer(
        qps,
        ask,
        "5/5 Which target rates (requests/s), at which price of a GPU or host hour?",
        "0.5, 1, 5",
        first.rates_of,
    )
    its_price = first.price_of(price) if price is not None else its_price
    written = first.write_plan(
        path, first.Answers(chosen_preset, where, traffic, ttfa_s, rtf, rates, its_price), force=force
    )
    out.print(f"Plan: [bold]{written}[/]", soft_wrap=True)
    on_gpu = "on the GPU host: harness doctor, then " if where else ""
    out.print(f"Next: {on_gpu}harness signoff {written}", soft_wrap=True, markup=False, highlight=False)


def _asked(question: str, default: str) -> str:
    try:
        return typer.prompt(question, default=default)
    except typer.Abort:
        raise InputError("no answer: give options (see `harness init --help`), or give --yes") from None


@app.command(epilog="Examples: `harness signoff scenarios/quick.yaml`, `harness signoff scenarios/h100.yaml --dry-run`")
@with_servers(without=ONE_AT_A_TIME, url_help=SERVERS_HELP)
def signoff(
    plan: Annotated[Path | None, typer.Argument(help="The PLAN.yaml to sign off, or quick.")] = None,
    results: Results = Path("results"),
    ray: Ray = "",
    topology: PlanTopology = "",
    dilate: PlanDilation = "",
    no_emulate: Measured = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again; an earlier run is renamed.")] = False,
    go_on: GoOn = False,
    accept: AcceptEstimates = False,
    dry_run: DryRun = False,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign the answer: an OpenSSH Ed25519 private key.")
    ] = None,
    store: Annotated[
        str,
        typer.Option("--store", metavar="URL", help="Copy the run there when it ends: a folder, or a URL like s3://…"),
    ] = "",
    check: Checked = None,
    trust: Trusted = None,
    servers: Servers = NO_SERVERS,
) -> None:
    """Deploy, drive, sweep, fit, plan and report. Resumes an interrupted run of the plan.

    With --check, nothing is measured: verify hashes and expiry, and recompute the answer from the run's records.
    Without --sign, signoff.json holds hashes only: they show that a file changed, but not who produced the answer.
    A plan that emulates a GPU that nobody measured, or dilates its time, ends with a planning estimate at best.
    With --dry-run, nothing is started: it prints the requests that each window is expected to hold, and those needed.
    Exit codes: 0 met, 1 missed, 2 inconclusive or an estimate (for --check also: changed, forged or expired), 64 usage
    error, 69 a server that cannot be used or that ended, 70 internal error, 130 interrupted.
    """
    from harness.cli.dry_run import dry_run as dry_run_of
    from harness.cli.tables import Show, print_plan
    from harness.export.store import must_be_usable
    from harness.report.signature import check_private_key
    from harness.signoff import SignOff

    if check is not None and plan is None:
        raise typer.Exit(check_signed(check, trust))
    if plan is None or check is not None:
        raise InputError("give either a PLAN.yaml to sign off, or --check DIR to verify a signed run")
    if trust is not None:
        raise InputError("--trust KEY.pub is for --check DIR: give both")
    if sign is not None:
        check_private_key(sign)  # before half an hour of measurements
    if store:
        must_be_usable(store)
    plan, url, changes = plan_file(plan), _measured(servers, ray), _changes(topology, dilate, no_emulate)
    if dry_run:
        raise typer.Exit(dry_run_of(plan, changes))
    if fresh:
        _set_aside(plan, results, url, ray, changes)
    work = SignOff(plan, results, url=url or None, ray=ray or None, **changes)
    with Show() as show:
        content = work.execute(show, go_on=go_on)
    print_plan(content)
    _conclude(work.run, sign, store)
    raise typer.Exit(_exit_code(content.verdict, accept))


def _conclude(run: Run, sign: Path | None, store: str) -> None:
    """Sign the answer with a key and copy the run, where that is asked for; print where the report is."""
    from harness.export.store import copy_run
    from harness.report.facts import is_signed
    from harness.report.signature import sign_seal

    if sign and is_signed(run):
        out.print(f"Signature: {sign_seal(run.path, sign)}", soft_wrap=True, markup=False)
    elif sign:
        say_aside("not signed: the run is not finished; start it again to resume", "yellow")
    out.print(f"Report: [bold]{run.path / 'signoff.html'}[/]", soft_wrap=True)
    if store:
        out.print(f"Stored: {copy_run(run.path, store)}", soft_wrap=True, markup=False)


@app.command(epilog="Example: `harness sweep scenarios/sweep.yaml --url gpu7:8001,gpu8:8001`")
@with_servers(without=ONE_AT_A_TIME, url_help=SERVERS_HELP)
def sweep(
    plan: Annotated[Path, typer.Argument(help="The PLAN.yaml to sweep.")],
    results: Results = Path("results"),
    ray: Ray = "",
    topology: PlanTopology = "",
    dilate: PlanDilation = "",
    no_emulate: Measured = False,
    servers: Servers = NO_SERVERS,
) -> None:
    """Measure only the ladders of the plan's space: which deployment is best, which knob matters. `signoff` resumes it.

    Writes sweep.html, and the best deployment's config.pbtxt files with their diff to the defaults into winner/.
    """
    from harness.cli.tables import Show
    from harness.report.facts import SWEEP_NAME
    from harness.report.sweep_page import describe_best
    from harness.signoff import SignOff

    changes = _changes(topology, dilate, no_emulate)
    work = SignOff(plan_file(plan), results, url=_measured(servers, ray) or None, ray=ray or None, **changes)
    with Show() as show:
        work.execute(show, ladders_only=True)
    path = work.run.path / SWEEP_NAME
    out.print(describe_best(work.run), soft_wrap=True, highlight=False)
    out.print(f"{len(work.run.trials())} trials; report: [bold]{path}[/]", soft_wrap=True)


def _measured(servers: Servers, ray: str) -> str:
    """The servers to be measured; a cluster's take precedence over those in the environment."""
    url = servers.measured()
    return "" if ray and servers.from_environment else url


def _exit_code(verdict: str, accept_estimates: bool) -> int:
    from harness.records.estimate import VERDICT

    return exit_codes.MET if accept_estimates and verdict == VERDICT else exit_codes.OF_VERDICT[verdict]


def _changes(topology: str, dilate: str, no_emulate: bool) -> dict[str, Any]:
    """What the command line changes in a plan, as ``deployed_as`` takes it."""
    return {"topology": topology, "dilate": dilation_of(dilate) if dilate else None, "measured": no_emulate}


def _set_aside(plan_path: Path, results: Path, url: str, ray: str, changes: dict[str, Any]) -> None:
    from harness.planfile.reading import deployed_as, load_plan
    from harness.records.store import Run
    from harness.runs import opening

    spec = deployed_as(load_plan(plan_path), **changes)
    path = results / opening.run_id_of(plan_path, spec, url or None, ray or None)
    if not Run.is_run(path):
        return
    run = Run.open(path)
    aside = path.with_name(f"{path.name}-{run.manifest.created_at[:19].replace(':', '')}")
    with run.lock():
        try:
            path.rename(aside)
        except OSError as error:
            raise InputError(f"cannot rename {path} to {aside.name}: {error.strerror}") from error
    out.print(f"the earlier run is now {aside}", soft_wrap=True)


def check_signed(folder: Path, trust: Path | None = None) -> int:
    """Print whether a finished run is unchanged and what its records give; returns the exit code.

    An answer signed by a trusted key stands even if another version of the harness recomputes another; that is a
    warning.
    """
    from harness.records.store import Run
    from harness.report.recomputed import differences
    from harness.report.seal import check_seal
    from harness.report.signature import problem_of_signature

    found = check_seal(folder)
    unsigned = problem_of_signature(folder, trust) if trust else ""
    problems = [*found.problems, *filter(None, [unsigned])]
    others = [] if found.problems else differences(Run.open(folder))
    if not trust or unsigned:
        problems += others
    for each in others if trust and not unsigned else ():
        out.print(f"warning: {each}", style="yellow", soft_wrap=True, markup=False)
    for problem in problems:
        out.print(problem, style="red", soft_wrap=True, markup=False)
    how = f"signed by the key of {trust}" if trust else "sealed, not signed with a key"
    state = f"{found.files} files unchanged, {how}" if not problems else "NOT VALID"
    out.print(f"{folder}: {found.verdict}, expires {found.expires_at}; {state}", soft_wrap=True, markup=False)
    return exit_codes.OF_VERDICT["inconclusive" if problems else found.verdict]
