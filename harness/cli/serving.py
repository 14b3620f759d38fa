"""Commands around a server: serve, speak, profile, doctor."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from harness import wire
from harness.cli.app import TOPOLOGY_HELP, Preset, app, out, say_aside, shown
from harness.cli.cards import CardsFile, estimate_profile
from harness.cli.server_options import NO_SERVERS, ONE_AT_A_TIME, Servers, with_servers
from harness.client.target import URL_VARIABLE
from harness.clock import AUTO, HOST, dilation_of
from harness.errors import InputError, ServerError
from harness.host.places import ROOT, SCENARIOS

if TYPE_CHECKING:
    from harness.deploy.config import Deployment

_MOST_SHORT, _SHORT_S = 4, 30  # runs of tritonserver this short in a row, before `harness serve` gives up


@app.command(
    epilog="Examples: `harness serve --knob diffusion_decoder.delay_us=2000`, "
    "`harness serve --topology fused --knob engine.max_batch=16`"
)
def serve(
    preset: Preset = "tiny",
    port: Annotated[int, typer.Option(help="gRPC port on 127.0.0.1; 0 = any free one.")] = 0,
    checkpoint: Annotated[str, typer.Option(help="A released checkpoint folder; default: random weights.")] = "",
    voices: Annotated[
        str,
        typer.Option(help="A folder of voices (WAV, FLAC, MP3, …), numbered by name; default: four synthetic voices."),
    ] = "",
    topology: Annotated[str, typer.Option(help=f"{TOPOLOGY_HELP[0].upper()}{TOPOLOGY_HELP[1:]}.")] = wire.STAGED,
    knob: Annotated[
        list[str],
        typer.Option("--knob", help="STAGE.KNOB=VALUE (staged) or engine.KNOB=VALUE (fused); repeatable."),
    ] = [],  # noqa: B006
    parameter: Annotated[
        list[str], typer.Option("--parameter", help="MODEL.PARAMETER=VALUE of a config.pbtxt; repeatable.")
    ] = [],  # noqa: B006
    emulate: Annotated[
        str, typer.Option(help="A profile: the stages take its times instead of computing; the audio is silent.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or gpu.")] = "auto",
    gpus: Annotated[
        int, typer.Option(help="GPUs of this server, real or emulated; each gets an instance of every stage.")
    ] = 1,
    dilate: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Run emulated GPUs N times slower; clients and load tests find out and report undilated times. auto: "
            "the smallest factor that takes less than 60% of this host.",
        ),
    ] = "1",
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
    deployment = _dilated(deployment, dilation_of(dilate))
    for note in _heard(deployment.voices):
        out.print(note, soft_wrap=True, markup=False)
    server = TritonServer(deployment, public=True, port=port or None)
    try:
        with out.status(f"starting Triton with preset {preset} …"):
            server.start()
        how = "" if topology == wire.STAGED else f", {topology},"
        out.print(f"serving preset {preset}{how} at [bold]{server.url}[/] (gRPC), metrics at {server.metrics_url}")
        if emulate:
            out.print(_emulated(deployment), soft_wrap=True)
        out.print(f"drive it with: locust -f {shown(SCENARIOS / 'podcast.py')}; Ctrl-C stops it", soft_wrap=True)
        _attend(server)
    finally:
        server.stop()


def _dilated(deployment: Deployment, asked: float | str) -> Deployment:
    """The deployment with its time dilation; AUTO is found by trying as many sessions as keep pace with speech."""
    if asked != AUTO:
        return replace(deployment, dilation=float(asked))
    if not deployment.emulate:
        raise InputError("--dilate is for emulated GPUs: give a profile with --emulate, or leave it out")
    from harness.drive.dilation import choose_dilation, real_time_sessions
    from harness.records.store import read_profile
    from harness.traffic.mix import MIXES

    sessions = real_time_sessions(read_profile(deployment.emulate)) * deployment.gpus
    return replace(deployment, dilation=choose_dilation(deployment, MIXES["mixed"], sessions, say=out.print))


def _emulated(deployment: Deployment) -> str:
    from harness.records.store import read_profile

    known_as = read_profile(deployment.emulate).known_as
    slower = "" if deployment.clock == HOST else f", time dilated {deployment.dilation:g} times"
    times = f"{deployment.gpus} x the {known_as} times of {deployment.emulate}"
    return f"[yellow]emulated{slower}[/]: {times}; the audio is silent"


def _attend(server) -> None:
    """Report restarts of model processes, and restart tritonserver when it ends, until it ends too often.

    A model process that dies while it holds a lock crashes Triton (2.51).
    """
    short = 0  # times in a row that it ended soon after its start
    while True:
        began_s = time.monotonic()
        while server.alive():
            _say_restarts(server)
            time.sleep(0.5)
        _say_restarts(server)
        short = short + 1 if time.monotonic() - began_s < _SHORT_S else 0
        told = server.last_words()
        if short == _MOST_SHORT:
            raise ServerError(f"{told}; it ended {short} times in a row within {_SHORT_S} s, and is not restarted")
        out.print(f"{told}; restarting it", soft_wrap=True, markup=False)
        server.restart()
        out.print(f"tritonserver was restarted at {server.url}", soft_wrap=True, markup=False)


def _say_restarts(server) -> None:
    for line in server.restarts():
        out.print(line, soft_wrap=True, markup=False)


@app.command(epilog="Example: `harness speak script.txt --frames 75 --wav speech.wav --keep talk.npz`")
@with_servers
def speak(
    script: Annotated[Path, typer.Argument(help="A text file with lines `Speaker N: text`.")],
    frames: Annotated[int, typer.Option(help="Frames of 133 ms to speak; default: as long as the text takes.")] = -1,
    wav: Annotated[Path | None, typer.Option(help="Write the audio to this WAV file.")] = None,
    until_end: Annotated[
        bool, typer.Option("--until-end", help="Stop where the model ends the text; --frames is then the maximum.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps of every frame, 1 to 100.")] = 10,
    guidance: Annotated[float, typer.Option(help="Guidance scale, 0 to 100; 1 = none.")] = 1.3,
    keep: Annotated[
        Path | None, typer.Option(help="Write the session to this file after the last frame, for --resume.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Resume a session that --keep wrote, with the same script.")
    ] = None,
    servers: Servers = NO_SERVERS,
) -> None:
    """Send one script to a server and print the result."""
    from harness.cli.speak import Manner, speak_file
    from harness.deploy.running import local_url

    manner = Manner(None if frames == -1 else frames, until_end, steps, guidance, keep, resume)
    if not script.is_file():
        raise InputError(f"cannot read {script}: no such file")
    local = None if servers.urls else local_url()
    target = servers.target(otherwise=local)
    if target is None:
        raise InputError("no server: give --url HOST:PORT, or run `harness serve` in another terminal")
    say_aside(f"asking {target.url}{_named_by(servers)}", "dim")
    out.print(speak_file(target, script, wav, manner), soft_wrap=True, markup=False)


def _named_by(servers: Servers) -> str:
    """Where the address comes from, if not from the command line."""
    if not servers.urls:
        return ", the `harness serve` of this host"
    return f", as {URL_VARIABLE} says" if servers.from_environment else ""


@app.command(
    epilog="Examples: `harness profile --preset tiny --device cpu`, `harness profile --estimate h100 --preset 1.5b`"
)
def profile(
    preset: Preset = "tiny",
    device: Annotated[str, typer.Option(help="auto (cuda where there is one), cuda or cpu.")] = "auto",
    folder: Annotated[Path, typer.Option("--out", help="Where <device>-<preset>.json goes.")] = Path(
        "results/profiles"
    ),
    budget_seconds: Annotated[
        float | None,
        typer.Option(help="Seconds for measuring; may be exceeded by up to 25%. Default: 60 for tiny, otherwise 420."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few points only.")] = False,
    checkpoint: Annotated[str, typer.Option(help="A released checkpoint folder; default: random weights.")] = "",
    weights_seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    estimate: Annotated[
        str,
        typer.Option("--estimate", metavar="CARD", help="Measure nothing: estimate this card, see `harness cards`."),
    ] = "",
    measured: Annotated[
        Path | None,
        typer.Option("--from", metavar="PROFILE", help="With --estimate: a measured profile of another card."),
    ] = None,
    topology: Annotated[str, typer.Option(help="With --estimate: staged or fused.")] = wire.STAGED,
    cards: CardsFile = None,
) -> None:
    """Measure every stage over batch and context, beside its roofline; `harness serve --emulate` uses the result.

    With --estimate, write the same from a card's data sheet and the model's shapes, with an interval for every time;
    with --from, efficiency and host times are those of a measured profile, and the intervals are narrower.
    """
    if estimate:
        estimate_profile(estimate, preset, topology, folder, measured, cards)
        return
    if measured or cards or topology != wire.STAGED:
        raise InputError("--from, --cards and --topology are for --estimate CARD: give it, or leave them out")
    from harness.deploy.profiling import ProfileJob, measure, tables
    from harness.records.store import read_profile

    asked = ProfileJob(preset, device, checkpoint, weights_seed, budget_seconds, quick)
    with out.status(f"building the stages of preset {preset} …") as status:
        path = measure(asked, folder, status.update if out.is_terminal else out.print)
    out.print("Milliseconds; in parentheses the roofline, the lower bound by memory and arithmetic")
    content = read_profile(path)
    for table in tables(content):
        out.print(table)
    if room := content.model.kv_room_bytes:
        out.print(
            f"Room for KV caches: {room / 2**30:.1f} GiB; --parameter {wire.LLM}.kv_limit_bytes={room} uses all of it"
        )
    out.print(f"Profile: [bold]{path}[/]", soft_wrap=True)


@app.command(epilog="Example: `harness doctor --url grpcs://gpu7:8001,gpu8:8001 --tls-ca ca.pem`")
@with_servers(without=ONE_AT_A_TIME)
def doctor(servers: Servers = NO_SERVERS) -> None:
    """What this machine can and cannot do, and how to fix it; with --url, whether servers are reachable."""
    from harness.cli.doctor import examine

    table = Table("", "what", "found", "how to fix it", box=None)
    checks = examine(ROOT, servers.target())
    for check in checks:
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]--[/]"}[check.fine]
        table.add_row(mark, check.what, check.found, check.fix)
    out.print(table)
    raise typer.Exit(0 if all(check.fine is not False for check in checks) else 1)


def _heard(folder: str) -> list[str]:
    """Read the voices of a folder before a server does; returns remarks. Raises InputError for an unusable one."""
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
