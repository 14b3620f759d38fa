"""The ``harness`` command: parse and call."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from harness import profile as job_of_profile
from harness import runs, wire
from harness import signoff as job
from harness.doctor import examine
from harness.errors import HarnessError, InputError
from harness.remote import with_target
from harness.report.page import write_report
from harness.speak import Manner, speak_file
from harness.spec import load_plan
from harness.store import Run, read_profile
from harness.targets import Target
from harness.triton.config import Deployment
from harness.triton.server import ROOT, TritonServer, local_url

UsageError = typer.BadParameter.__base__  # typer carries a click of its own and does not export this one
EXIT_MISTAKE = 64  # EX_USAGE of sysexits.h: the command was given something it cannot use
EXIT_INTERRUPTED = 130
_MAX_QPS = 1e6

app = typer.Typer(
    help="How many GPUs does long-form, multi-speaker speech need at each target QPS?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out = Console()
RunFolder = Annotated[Path, typer.Option("--run", help="A folder under results/.")]
Results = Annotated[Path, typer.Option("--results", help="Where runs are kept.")]
Preset = Annotated[str, typer.Option(help="tiny, 1.5b, 7b, or a .json file of sizes.")]
Url = Annotated[str, typer.Option("--url", help="A running Triton (host:port); it is neither started nor stopped.")]


@app.command(epilog="Example: `harness signoff scenarios/quick.yaml`")
def signoff(
    plan: Annotated[Path, typer.Argument(help="The PLAN.yaml to sign off.")],
    results: Results = Path("results"),
    url: Url = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew; set an earlier run aside.")] = False,
) -> None:
    """Deploy, drive, sweep, fit, plan and report. Goes on where an earlier run of the plan stopped.

    Exit codes: 0 met, 1 missed, 2 inconclusive, 64 a mistake in what was asked, 130 interrupted.
    """
    if fresh:
        _set_aside(plan, results, url)
    work = job.SignOff(plan, results, url=url or None)
    with Show() as show:
        content = work.execute(show)
    print_plan(content)
    out.print(f"Report: [bold]{work.run.path / 'signoff.html'}[/]", soft_wrap=True)
    raise typer.Exit(job.EXIT_CODES[content["verdict"]])


@app.command(epilog="Example: `harness sweep scenarios/quick.yaml`")
def sweep(
    plan: Annotated[Path, typer.Argument(help="The PLAN.yaml whose space is walked.")],
    results: Results = Path("results"),
    url: Url = "",
) -> None:
    """Only the ladders of every point in the plan's space, kept in the same run that `signoff` goes on with."""
    work = job.SignOff(plan, results, url=url or None)
    with Show() as show:
        work.execute(show, ladders_only=True)
    out.print(f"{len(work.run.trials())} trials in [bold]{work.run.path}[/]", soft_wrap=True)


@app.command(epilog="Example: `harness fit --run results/quick-1a2b3c4d`")
def fit(run: RunFolder) -> None:
    """Fit the capacity models again from a run's stored trials, and print what they say."""
    stored = Run.open(run)
    with stored.lock():
        content = runs.fit_of(stored)
        stored.write_fit(content)
    print_fit(content)


@app.command(epilog="Example: `harness plan --run results/quick-1a2b3c4d --qps 0.5,1,5,20`")
def plan(
    run: RunFolder,
    qps: Annotated[str, typer.Option("--qps", help="Target rates, comma-separated; left out = the plan's own.")] = "",
) -> None:
    """The table of devices for other target rates, from stored results, in seconds."""
    stored = Run.open(run)
    spec = runs.spec_of(stored)
    content = stored.fit()
    if content is None:
        raise InputError(f"{run} holds no fit yet: run `harness fit --run {run}` first")
    print_plan(runs.plan_of(stored, spec, content, _rates(qps) or spec.targets_qps))


@app.command(epilog="Example: `harness simulate --run results/quick-1a2b3c4d --qps 0.8`")
def simulate(
    run: RunFolder,
    qps: Annotated[float, typer.Option("--qps", help="Requests per second on one device, Poisson.")],
) -> None:
    """What one device of the best deployment would show at a rate: simulated from stored fits, nothing is run."""
    stored = Run.open(run)
    print_prediction(runs.simulation_of(stored, _rates(str(qps))[0]), runs.unit_of(stored.manifest))


@app.command(epilog="Example: `harness report --run results/quick-1a2b3c4d`")
def report(run: RunFolder) -> None:
    """Write signoff.html again from a run's stored records."""
    out.print(f"Report: [bold]{write_report(Run.open(run))}[/]", soft_wrap=True)


@app.command(epilog="Example: `harness serve --knob diffusion_decoder.delay_us=2000`")
def serve(
    preset: Preset = "tiny",
    port: Annotated[int, typer.Option(help="gRPC port on 127.0.0.1; 0 = any free one.")] = 0,
    checkpoint: Annotated[str, typer.Option(help="A released checkpoint folder; left out = random weights.")] = "",
    voices: Annotated[str, typer.Option(help="A folder of 24 kHz mono WAV files; left out = four made voices.")] = "",
    knob: Annotated[list[str], typer.Option("--knob", help="<stage>.<knob>=<value>; may be repeated.")] = [],  # noqa: B006
    parameter: Annotated[
        list[str], typer.Option("--parameter", help="<model>.<parameter>=<value> of a config.pbtxt; may be repeated.")
    ] = [],  # noqa: B006
    emulate: Annotated[
        str, typer.Option(help="A profile: the stages take its times instead of computing, and the audio is silent.")
    ] = "",
    gpus: Annotated[int, typer.Option(help="Emulated GPUs; each gets an instance of every stage.")] = 1,
) -> None:
    """Deploy the ensemble on a local Triton, in the foreground; Ctrl-C stops it cleanly."""
    deployment = Deployment(
        preset, checkpoint, voices, knobs=dict(_knob(each) for each in knob),
        parameters=dict(_parameter(each) for each in parameter), emulate=emulate, gpus=gpus,
    )  # fmt: skip
    server = TritonServer(deployment, public=True, port=port or None)
    try:
        with out.status(f"starting Triton with preset {preset} …"):
            server.start()
        out.print(f"serving preset {preset} at [bold]{server.url}[/] (gRPC), metrics at {server.metrics_url}")
        if emulate:
            out.print(f"[yellow]emulated[/]: {gpus} x the times of {emulate}; the audio is silent", soft_wrap=True)
        out.print("drive it with: locust -f scenarios/podcast.py; Ctrl-C stops it")
        while server.alive():
            time.sleep(0.5)
    finally:
        server.stop()
    raise HarnessError("Triton ended by itself; start it again, and look at the memory of this machine")


@app.command(epilog="Example: `harness speak script.txt --frames 75 --wav speech.wav --keep talk.npz`")
@with_target
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
    target: Target | None = None,
) -> None:
    """Send one script to a server and say how it went."""
    manner = Manner(None if frames == -1 else frames, until_end, steps, guidance, keep, resume)
    if not script.is_file():
        raise InputError(f"cannot read {script}: there is no such file")
    found = target or local_url()
    if not found:
        raise InputError("no server: give --url HOST:PORT, or run `harness serve` in another terminal")
    out.print(speak_file(found, script, wav, manner), soft_wrap=True)


@app.command(epilog="Example: `harness profile --preset tiny --device cpu`")
def profile(
    preset: Preset = "tiny",
    device: Annotated[str, typer.Option(help="auto (cuda where there is one), cuda or cpu.")] = "auto",
    folder: Annotated[Path, typer.Option("--out", help="Where <device>-<preset>.json goes.")] = Path(
        "results/profiles"
    ),
    budget_seconds: Annotated[
        float | None, typer.Option(help="The most that it may take; left out = 60 at preset tiny, else 420.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few points only.")] = False,
    checkpoint: Annotated[str, typer.Option(help="A released checkpoint folder; left out = random weights.")] = "",
    weights_seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
) -> None:
    """Measure every stage over batch and context, beside its roofline; `harness serve --emulate` takes the result."""
    asked = job_of_profile.ProfileJob(preset, device, checkpoint, weights_seed, budget_seconds, quick)
    with out.status(f"building the stages of preset {preset} …") as status:
        path = job_of_profile.measure(asked, folder, status.update if out.is_terminal else out.print)
    out.print("Milliseconds; in parentheses those of the roofline: what memory and arithmetic take at the least")
    content = read_profile(path)
    for table in job_of_profile.tables(content):
        out.print(table)
    room = content["model"]["kv_room_bytes"]
    out.print(f"Room for KV caches: {room / 2**30:.1f} GiB; --parameter {wire.LLM}.kv_limit_bytes={room} takes it all")
    out.print(f"Profile: [bold]{path}[/]", soft_wrap=True)


@app.command(epilog="Example: `harness doctor --url grpcs://gpu7:8001,gpu8:8001 --tls-ca ca.pem`")
@with_target
def doctor(target: Target | None = None) -> None:
    """What this machine can and cannot do, and how to mend it; with --url, whether servers can be reached."""
    table = Table("", "what", "found", "how to mend it", box=None)
    checks = examine(ROOT, target)
    for check in checks:
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]--[/]"}[check.fine]
        table.add_row(mark, check.what, check.found, check.mend)
    out.print(table)
    raise typer.Exit(0 if all(check.fine is not False for check in checks) else 1)


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


def main() -> None:
    """Entry point: a user's mistake is one message, and Ctrl-C or a polite kill ends cleanly."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(signum, _as_interrupt)
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        error.show()
        sys.exit(EXIT_MISTAKE)
    except HarnessError as error:
        Console(stderr=True).print(f"harness: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_MISTAKE)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(EXIT_INTERRUPTED)


def _as_interrupt(*_) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):  # a second one would cut the clean-up short, which is soon over
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def _set_aside(plan_path: Path, results: Path, url: str) -> None:
    path = results / runs.run_id_of(plan_path, load_plan(plan_path), url or None)
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
    except ValueError:
        raise InputError(f"--qps {text!r}: give rates with commas between them, such as 0.5,1,5") from None
    if any(not 0 < rate <= _MAX_QPS for rate in rates):
        raise InputError(f"--qps {text!r}: every rate must be above 0 and at most {_MAX_QPS:g}")
    return rates


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


def _count(value) -> str:
    return "-" if value is None else f"{value:g}"


def _percent(value) -> str:
    return "-" if value is None else f"{value:.0%}"
