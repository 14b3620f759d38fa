"""The ``harness`` command: parse and call."""

from __future__ import annotations

import inspect
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness import wire
from harness.cli.server_options import ONE_AT_A_TIME, Servers, with_servers
from harness.client.target import URL_VARIABLE
from harness.errors import HarnessError, InputError
from harness.host.places import ROOT, SCENARIOS, plan_file, scenario_files
from harness.report.screen import Screen

if TYPE_CHECKING:  # a command imports what it needs when it runs: `harness --help` waits for no torch and no pandas
    from harness.records.store import Run

UsageError = typer.BadParameter.__base__  # typer carries a click of its own and does not export this one
EXIT_MISTAKE = 64  # EX_USAGE of sysexits.h: the command was given something it cannot use
EXIT_FAULT = 70  # EX_SOFTWARE: Python's own 1 would read as "missed"
EXIT_INTERRUPTED = 130
_MAX_QPS = 1e6

out = Screen()

app = typer.Typer(
    help="How many GPUs does long-form, multi-speaker speech need at each target QPS?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
RunFolder = Annotated[Path, typer.Option("--run", help="A folder under results/.")]
Results = Annotated[Path, typer.Option("--results", help="Where runs are kept.")]
Preset = Annotated[str, typer.Option(help="tiny, 1.5b, 7b, or a .json file of sizes.")]
_TOPOLOGY = (
    "staged (each stage a Triton model, joined by an ensemble) or fused (all stages in one process, sessions stepped "
    "together)"
)
PlanTopology = Annotated[str, typer.Option("--topology", help=f"In place of the plan's: {_TOPOLOGY}.")]
_MEASURED = "A running Triton (HOST:PORT), neither started nor stopped; several: a trial at a time on each."
Ray = Annotated[
    str, typer.Option("--ray", help="A Ray cluster (auto, or its address): a trial at a time on each of its GPU hosts.")
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
        typer.Option(help="short (10 s), mixed (95% of 10 s, 5% of 90 min), long (90 min), or seconds of your own."),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(help="SLOs: p95 of time to first audio in seconds, and of the real-time factor: 1.0,0.9"),
    ] = None,
    qps: Annotated[str | None, typer.Option(help="Target rates, requests per second, comma-separated.")] = None,
    price: Annotated[str | None, typer.Option(help="Price of an hour of one GPU or host.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: defaults for what no option says.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a first plan from five answers; what an option says is not asked."""
    from harness.cli import first_plan as first

    if path.exists() and not force:  # before five questions
        raise InputError(f"{path} is there already, and stays as it is: give another name, or --force to replace it")
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
        raise InputError("no answer came: say it with options (see `harness init --help`), or give --yes") from None


@app.command(epilog="Example: `harness signoff scenarios/quick.yaml`")
@with_servers(without=ONE_AT_A_TIME, url_help=_MEASURED)
def signoff(
    plan: Annotated[Path | None, typer.Argument(help="The PLAN.yaml to sign off, or quick.")] = None,
    results: Results = Path("results"),
    ray: Ray = "",
    topology: PlanTopology = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew; set an earlier run aside.")] = False,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Measure what the budget of a finished run left out; seal it anew.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign the answer: an OpenSSH Ed25519 private key.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="DIR", help="Verify the folder of a finished run instead.")
    ] = None,
    trust: Annotated[
        Path | None, typer.Option("--trust", metavar="KEY.pub", help="With --check: the key that must have signed it.")
    ] = None,
    servers: Servers | None = None,
) -> None:
    """Deploy, drive, sweep, fit, plan and report. Goes on where an earlier run of the plan stopped.

    With --check, nothing is measured: the run is held against the hashes of its evidence and its expiry, and its answer
    is computed again from its records. Without a key's signature an answer is sealed, not signed: the hashes tell of
    changes, and not who made it.
    Exit codes: 0 met, 1 missed, 2 inconclusive (for --check also: changed, forged or expired), 64 a mistake in what was
    asked, 70 a fault of the harness, 130 interrupted.
    """
    from harness.cli.tables import Show, print_plan
    from harness.report.facts import is_signed
    from harness.report.signature import check_private_key, sign_seal
    from harness.signoff import EXIT_CODES, SignOff

    if (plan is None) == (check is None):
        raise InputError("give one of the two: a PLAN.yaml to sign off, or --check DIR to verify a signed run")
    if trust is not None and check is None:
        raise InputError("--trust KEY.pub is for --check DIR: give both")
    if check is not None:
        raise typer.Exit(_checked(check, trust))
    if sign is not None:
        check_private_key(sign)  # before half an hour of measurements
    plan, url = plan_file(plan), _measured(servers, ray)
    if fresh:
        _set_aside(plan, results, url, ray, topology)
    work = SignOff(plan, results, url=url or None, ray=ray or None, topology=topology)
    with Show() as show:
        content = work.execute(show, go_on=go_on)
    print_plan(content)
    if sign and is_signed(work.run):
        out.print(f"Signature: {sign_seal(work.run.path, sign)}", soft_wrap=True, markup=False)
    elif sign:
        _say_aside("nothing was signed: the run is not finished, run it again to go on", "yellow")
    out.print(f"Report: [bold]{work.run.path / 'signoff.html'}[/]", soft_wrap=True)
    raise typer.Exit(EXIT_CODES[content.verdict])


@app.command(epilog="Example: `harness sweep scenarios/sweep.yaml --url gpu7:8001,gpu8:8001`")
@with_servers(without=ONE_AT_A_TIME, url_help=_MEASURED)
def sweep(
    plan: Annotated[Path, typer.Argument(help="The PLAN.yaml whose space is walked.")],
    results: Results = Path("results"),
    ray: Ray = "",
    topology: PlanTopology = "",
    servers: Servers | None = None,
) -> None:
    """Only the ladders of the plan's space: which deployment is best, which knob mattered; `signoff` goes on with it.

    Writes sweep.html, and the best deployment's config.pbtxt files with their diff to the defaults into winner/.
    """
    from harness.cli.tables import Show
    from harness.report.facts import SWEEP_NAME
    from harness.report.sweep_page import best_in_words
    from harness.signoff import SignOff

    work = SignOff(plan_file(plan), results, url=_measured(servers, ray) or None, ray=ray or None, topology=topology)
    with Show() as show:
        work.execute(show, ladders_only=True)
    path = work.run.path / SWEEP_NAME
    out.print(best_in_words(work.run), soft_wrap=True, highlight=False)
    out.print(f"{len(work.run.trials())} trials; report: [bold]{path}[/]", soft_wrap=True)


def _measured(servers: Servers, ray: str) -> str:
    """The servers to be measured; those of a cluster come before those that the environment names."""
    url = servers.measured()
    return "" if ray and servers.from_environment else url


@app.command(epilog="Example: `harness fit --run results/quick-1a2b3c4d`")
def fit(run: RunFolder) -> None:
    """Fit the capacity models again from a run's stored trials, and print what they say.

    Of a run that was signed the fit is only printed: its stored one is part of what was signed.
    """
    from harness.cli.tables import print_fit
    from harness.report.facts import is_signed
    from harness.runs import analysis

    stored = _opened(run)
    signed = stored.manifest.sealed or is_signed(stored)
    with stored.lock():
        content = analysis.fit_of(stored)
        if not signed:
            stored.write_fit(content)
    print_fit(content)
    if signed:
        out.print("The run is signed: its stored fit.json stays as it was", soft_wrap=True)


def _opened(folder: Path) -> Run:
    """A stored run. Where it was signed and is no longer as it was, or has expired, that is said beside the answer."""
    from harness.records.store import Run
    from harness.report.facts import is_signed
    from harness.report.seal import check_seal

    stored = Run.open(folder)
    if is_signed(stored) and (problems := check_seal(folder).problems):
        _say_aside(f"This run is not to be relied on: {'; '.join(problems)}", "yellow")
    return stored


def _say_aside(words: str, style: str) -> None:
    Console(stderr=True).print(words, style=style, markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Example: `harness plan --run results/quick-1a2b3c4d --qps 0.5,1,5,20`")
def plan(
    run: RunFolder,
    qps: Annotated[str, typer.Option("--qps", help="Target rates, comma-separated; left out = the plan's own.")] = "",
) -> None:
    """The table of devices for other target rates, from stored results, in seconds."""
    from harness.cli.tables import print_plan
    from harness.runs import analysis, opening

    stored = _opened(run)
    spec = opening.spec_of(stored)
    content = stored.fit()
    if content is None:
        raise InputError(f"{run} holds no fit yet: run `harness fit --run {run}` first")
    anew = analysis.plan_of(stored, spec, content, _rates(qps) or spec.targets_qps)
    before = stored.plan()
    if before and before.doubts:  # of the sign-off: its budget left out what an answer needs
        anew = replace(anew, verdict="inconclusive", reasons=(*anew.reasons, *before.doubts))
    print_plan(anew)


@app.command(epilog="Example: `harness simulate --run results/quick-1a2b3c4d --qps 0.8`")
def simulate(
    run: RunFolder,
    qps: Annotated[float, typer.Option("--qps", help="Requests per second on one device, Poisson.")],
) -> None:
    """What one device of the best deployment would show at a rate: simulated from stored fits, nothing is run."""
    from harness.cli.tables import print_prediction
    from harness.runs import analysis, opening

    stored = _opened(run)
    print_prediction(analysis.simulation_of(stored, _rates(str(qps))[0]), opening.unit_of(stored.manifest))


@app.command(epilog="Example: `harness report --run results/quick-1a2b3c4d`")
def report(
    run: RunFolder,
    pdf: Annotated[bool, typer.Option("--pdf", help="Print signoff.pdf too, by an installed Chromium.")] = False,
) -> None:
    """Write signoff.html and sweep.html again from a run's stored records; what was signed must be as it was."""
    from harness.records.store import Run
    from harness.report.facts import SIGNATURE_NAME, is_signed
    from harness.report.paper import write_pdf
    from harness.report.seal import report_again, seal_of
    from harness.report.sweep_page import write_sweep_report

    stored = Run.open(run)
    with stored.lock():
        before = seal_of(stored)
        path = report_again(stored)
        out.print(f"Sweep: [bold]{write_sweep_report(stored)}[/]", soft_wrap=True)
    out.print(f"Report: [bold]{path}[/]", soft_wrap=True)
    if pdf:
        out.print(f"PDF: [bold]{write_pdf(path)}[/]", soft_wrap=True)
    if is_signed(stored):
        out.print("Sealed as before: of the seal, only the hash of the page may be new", soft_wrap=True)
    if seal_of(stored) != before and (stored.path / SIGNATURE_NAME).exists():
        words = (
            "the page is new, so the signature of a key no longer holds: sign it again by `harness signoff PLAN --sign`"
        )
        _say_aside(words, "yellow")


@app.command(
    epilog="Examples: `harness serve --knob diffusion_decoder.delay_us=2000`, "
    "`harness serve --topology fused --knob engine.max_batch=16`"
)
def serve(
    preset: Preset = "tiny",
    port: Annotated[int, typer.Option(help="gRPC port on 127.0.0.1; 0 = any free one.")] = 0,
    checkpoint: Annotated[str, typer.Option(help="A released checkpoint folder; left out = random weights.")] = "",
    voices: Annotated[
        str, typer.Option(help="A folder of voices (WAV, FLAC, MP3, …), numbered by name; left out = four made voices.")
    ] = "",
    topology: Annotated[str, typer.Option(help=f"{_TOPOLOGY[0].upper()}{_TOPOLOGY[1:]}.")] = wire.STAGED,
    knob: Annotated[
        list[str],
        typer.Option("--knob", help="<stage>.<knob>=<value>, of the fused topology engine.<knob>; may be repeated."),
    ] = [],  # noqa: B006
    parameter: Annotated[
        list[str], typer.Option("--parameter", help="<model>.<parameter>=<value> of a config.pbtxt; may be repeated.")
    ] = [],  # noqa: B006
    emulate: Annotated[
        str, typer.Option(help="A profile: the stages take its times instead of computing, and the audio is silent.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or gpu.")] = "auto",
    gpus: Annotated[
        int, typer.Option(help="GPUs of this server, real or emulated; each gets an instance of every stage.")
    ] = 1,
) -> None:
    """Deploy the ensemble, or the fused engine, on a local Triton, in the foreground; Ctrl-C stops it cleanly."""
    from harness.deploy.config import Deployment
    from harness.deploy.server import TritonServer

    deployment = Deployment(
        preset, checkpoint, voices, knobs=dict(_knob(each) for each in knob),
        parameters=dict(_parameter(each) for each in parameter), emulate=emulate, gpus=gpus, device=device,
        topology=topology,
    )  # fmt: skip
    deployment.check()
    for note in _heard(deployment.voices):
        out.print(note, soft_wrap=True, markup=False)
    server = TritonServer(deployment, public=True, port=port or None)
    try:
        with out.status(f"starting Triton with preset {preset} …"):
            server.start()
        how = "" if topology == wire.STAGED else f", {topology},"
        out.print(f"serving preset {preset}{how} at [bold]{server.url}[/] (gRPC), metrics at {server.metrics_url}")
        if emulate:
            out.print(f"[yellow]emulated[/]: {gpus} x the times of {emulate}; the audio is silent", soft_wrap=True)
        out.print(f"drive it with: locust -f {_shown(SCENARIOS / 'podcast.py')}; Ctrl-C stops it", soft_wrap=True)
        while server.alive():
            time.sleep(0.5)
        ended = server.last_words()
    finally:
        server.stop()
    raise HarnessError(f"nobody stopped the server, and {ended}; start it again")


@app.command(epilog="Example: `harness speak script.txt --frames 75 --wav speech.wav --keep talk.npz`")
@with_servers
def speak(
    script: Annotated[Path, typer.Argument(help="A text file with lines `Speaker N: text`.")],
    frames: Annotated[int, typer.Option(help="Frames of 133 ms to speak; left out = as long as the text takes.")] = -1,
    wav: Annotated[Path | None, typer.Option(help="Write the audio to this WAV file.")] = None,
    until_end: Annotated[
        bool, typer.Option("--until-end", help="Stop where the model says that the text ends; --frames is the most.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps of every frame, 1 to 100.")] = 10,
    guidance: Annotated[float, typer.Option(help="Guidance scale, 0 to 100; 1 = none.")] = 1.3,
    keep: Annotated[
        Path | None, typer.Option(help="Write the session to this file after the last frame, for --resume.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a session that --keep wrote, under the same script.")
    ] = None,
    servers: Servers | None = None,
) -> None:
    """Send one script to a server and say how it went."""
    from harness.cli.speak import Manner, speak_file
    from harness.deploy.server import local_url

    manner = Manner(None if frames == -1 else frames, until_end, steps, guidance, keep, resume)
    if not script.is_file():
        raise InputError(f"cannot read {script}: there is no such file")
    local = None if servers.urls else local_url()
    target = servers.target(otherwise=local)
    if target is None:
        raise InputError("no server: give --url HOST:PORT, or run `harness serve` in another terminal")
    _say_aside(f"asking {target.url}{_named_by(servers)}", "dim")
    out.print(speak_file(target, script, wav, manner), soft_wrap=True, markup=False)


def _named_by(servers: Servers) -> str:
    """Where the address comes from, if not from the command line."""
    if not servers.urls:
        return ", the `harness serve` of this host"
    return f", as {URL_VARIABLE} says" if servers.from_environment else ""


@app.command(epilog="Example: `harness profile --preset tiny --device cpu`")
def profile(
    preset: Preset = "tiny",
    device: Annotated[str, typer.Option(help="auto (cuda where there is one), cuda or cpu.")] = "auto",
    folder: Annotated[Path, typer.Option("--out", help="Where <device>-<preset>.json goes.")] = Path(
        "results/profiles"
    ),
    budget_seconds: Annotated[
        float | None,
        typer.Option(help="For measuring; a slow stage may add a quarter. Left out = 60 at tiny, else 420."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few points only.")] = False,
    checkpoint: Annotated[str, typer.Option(help="A released checkpoint folder; left out = random weights.")] = "",
    weights_seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
) -> None:
    """Measure every stage over batch and context, beside its roofline; `harness serve --emulate` takes the result."""
    from harness.deploy.profiling import ProfileJob, measure, tables
    from harness.records.store import read_profile

    asked = ProfileJob(preset, device, checkpoint, weights_seed, budget_seconds, quick)
    with out.status(f"building the stages of preset {preset} …") as status:
        path = measure(asked, folder, status.update if out.is_terminal else out.print)
    out.print("Milliseconds; in parentheses those of the roofline: what memory and arithmetic take at the least")
    content = read_profile(path)
    for table in tables(content):
        out.print(table)
    room = content["model"]["kv_room_bytes"]
    out.print(f"Room for KV caches: {room / 2**30:.1f} GiB; --parameter {wire.LLM}.kv_limit_bytes={room} takes it all")
    out.print(f"Profile: [bold]{path}[/]", soft_wrap=True)


@app.command(epilog="Example: `harness doctor --url grpcs://gpu7:8001,gpu8:8001 --tls-ca ca.pem`")
@with_servers
def doctor(servers: Servers | None = None) -> None:
    """What this machine can and cannot do, and how to fix it; with --url, whether servers can be reached."""
    from harness.cli.doctor import examine

    table = Table("", "what", "found", "how to fix it", box=None)
    checks = examine(ROOT, servers.target())
    for check in checks:
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]--[/]"}[check.fine]
        table.add_row(mark, check.what, check.found, check.fix)
    out.print(table)
    raise typer.Exit(0 if all(check.fine is not False for check in checks) else 1)


@app.command(epilog="Example: `locust -f $(harness scenarios podcast) --headless -u 4 -t 20s`")
def scenarios(
    name: Annotated[str, typer.Argument(help="Print the path of this one alone, for another command.")] = "",
    copy: Annotated[Path | None, typer.Option("--copy", help="Copy it, or all of them, into this folder.")] = None,
) -> None:
    """List the scenarios, plans, mixes and scripts that come with the harness, or copy them to change them."""
    files = scenario_files()
    if name:
        files = {found: path for found, path in files.items() if name in (found, str(Path(found).with_suffix("")))}
        if not files:
            raise InputError(f"no scenario {name!r}: use one of {', '.join(scenario_files())}")
    if copy:
        _copy(files, copy)
    elif name:
        print(*files.values())
    else:
        table = Table("name", "path", box=None)
        for found, path in files.items():
            table.add_row(found, str(_shown(path)))
        out.print(table)


def _copy(files: dict[str, Path], folder: Path) -> None:
    """Copy files to their names below a folder. Raises InputError, before anything is written, where one is there."""
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise InputError(f"{folder / there[0]} is there already: give --copy another folder, or move it away")
    try:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; give --copy another folder") from None
    out.print(f"{len(files)} files in {folder}", soft_wrap=True)


def _shown(path: Path) -> Path:
    """A path as it is shorter to type."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _say_whole_help() -> None:
    """Help shows every docstring as it stands: its paragraphs are folded, and no bracket is taken for markup."""
    for command in app.registered_commands:
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = escape("\n\n".join(" ".join(each.split()) for each in paragraphs))


_say_whole_help()


def main() -> None:
    """Entry point: a user's mistake is one message, Ctrl-C or a polite kill ends cleanly, a fault is no verdict."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(signum, _as_interrupt)
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        error.show()
        sys.exit(EXIT_MISTAKE)
    except HarnessError as error:
        _say_aside(f"harness: {error}", "red")
        sys.exit(EXIT_MISTAKE)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(EXIT_INTERRUPTED)
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_FAULT)


def _as_interrupt(*_) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):  # a second one would cut the clean-up short, which is soon over
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def _checked(folder: Path, trust: Path | None = None) -> int:
    """Say whether a finished run is as it was sealed or signed, and what its records give; its exit code.

    What a trusted key signed stands, whatever another version of the harness computes: that is then a warning.
    """
    from harness.records.store import Run
    from harness.report.recomputed import differences
    from harness.report.seal import check_seal
    from harness.report.signature import problem_of_signature
    from harness.signoff import EXIT_CODES

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
    state = f"{found.files} files as they were, {how}" if not problems else "not to be relied on"
    out.print(f"{folder}: {found.verdict}, expires {found.expires_at}; {state}", soft_wrap=True, markup=False)
    return EXIT_CODES["inconclusive" if problems else found.verdict]


def _set_aside(plan_path: Path, results: Path, url: str, ray: str, topology: str) -> None:
    from harness.planfile import deployed_as, load_plan
    from harness.records.store import Run
    from harness.runs import opening

    spec = deployed_as(load_plan(plan_path), topology)
    path = results / opening.run_id_of(plan_path, spec, url or None, ray or None)
    if not Run.is_run(path):
        return
    run = Run.open(path)
    aside = path.with_name(f"{path.name}-{run.manifest.created_at[:19].replace(':', '')}")
    with run.lock():
        try:
            path.rename(aside)
        except OSError as error:
            raise InputError(f"cannot set {path} aside as {aside.name}: {error.strerror}") from error
    out.print(f"the earlier run is now {aside}", soft_wrap=True)


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(",") if part.strip())
        if text and not rates:
            raise ValueError(text)
    except ValueError:
        raise InputError(f"--qps {text!r}: give rates with commas between them, such as 0.5,1,5") from None
    if any(not 0 < rate <= _MAX_QPS for rate in rates):
        raise InputError(f"--qps {text!r}: every rate must be above 0 and at most {_MAX_QPS:g}")
    return rates


def _heard(folder: str) -> list[str]:
    """What is done to the voices of a folder, before a server does it. Raises InputError for one that is broken."""
    from harness.traffic.voice_folder import read_voice, voice_files

    files = enumerate(voice_files(folder) if folder else (), start=1)
    notes = [f"voice {number}: {note}" for number, file in files if (note := read_voice(file)[1])]
    return [*notes, f"{len(voice_files(folder))} voices of {folder}"] if folder else []


def _knob(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not value.lstrip("-").isdigit():
        raise InputError(f"--knob {text!r}: write it as <stage>.<knob>=<whole number>")
    return name, int(value)


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--parameter {text!r}: write it as <model>.<parameter>=<value>")
    return name, value
