"""The command `harness studio`: the service that people use, on one machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from harness import wire
from harness.cli.app import TOPOLOGY_HELP, Preset, app, out
from harness.cli.server_options import NO_SERVERS, Servers, with_servers
from harness.client.target import as_environment
from harness.errors import InputError

_SPEAKING = "The Triton that is started, where no --url is given"
_LIMITS = "Each is also a variable HARNESS_STUDIO_NAME: see the how-to page"


@app.command(
    epilog="Examples: `harness studio`, `harness studio --url gpu7:8001 --redis redis://queue:6379 "
    "--storage s3://podcasts/audio --host 0.0.0.0 --keys-file keys.txt`"
)
@with_servers(url_help="Triton's HOST:PORT, several with commas; left out: one is started.")
def studio(
    host: Annotated[str | None, typer.Option(help="Address to listen on; beyond loopback keys are needed.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the page and the API [8080]; 0 = any free one.")] = None,
    folder: Annotated[Path | None, typer.Option(help="State of the studio: queue, voices, audio, logs.")] = None,
    storage: Annotated[str | None, typer.Option(help="Where audio goes: a folder, or a URL such as s3://…")] = None,
    redis: Annotated[str | None, typer.Option(help="redis://HOST:PORT; left out: one is started.")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="File with the keys of callers, one a line.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    jobs_at_once: Annotated[
        int | None, typer.Option(help="Tasks of a worker at once.", rich_help_panel=_LIMITS)
    ] = None,
    segment_seconds: Annotated[
        float | None,
        typer.Option(help="Audio of a segment: what a fault costs at most.", rich_help_panel=_LIMITS),
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option(
            help="Sessions that the servers hold within their SLOs: tasks get what streams leave.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    preset: Preset = "tiny",
    checkpoint: Annotated[str, typer.Option(help="A released checkpoint folder.", rich_help_panel=_SPEAKING)] = "",
    voices: Annotated[str, typer.Option(help="A folder of voices; with --url: the folder that the servers have.")] = "",
    topology: Annotated[
        str, typer.Option(help=f"{TOPOLOGY_HELP[0].upper()}{TOPOLOGY_HELP[1:]}.", rich_help_panel=_SPEAKING)
    ] = wire.STAGED,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.", rich_help_panel=_SPEAKING)] = "auto",
    gpus: Annotated[int, typer.Option(help="GPUs that it uses.", rich_help_panel=_SPEAKING)] = 1,
    servers: Servers = NO_SERVERS,
) -> None:
    """Run the service that people use: page, API, tasks and streams, in the foreground; Ctrl-C ends all of it.

    What is not given is started: Triton, and a Redis whose file keeps the queue. Tasks and audio stay in the folder.
    """
    from harness.deploy.config import Deployment
    from harness.service.settings import StudioSettings
    from harness.service.studio import Studio, StudioPlan

    settings = StudioSettings.from_environment(
        host=host, port=port, folder=str(folder) if folder else None, storage=storage, redis=redis,
        keys=_keys(keys_file) if keys_file else None, jobs_at_once=jobs_at_once, segment_s=segment_seconds,
        sessions=sessions, url=",".join(servers.urls) or None, voices=voices if servers.urls and voices else None,
    )  # fmt: skip
    deployment = None
    if settings.url:
        servers.target(otherwise=settings.url)  # refuses addresses and options that cannot be used
        os.environ.update(as_environment(servers.given))
    else:
        deployment = Deployment(preset, checkpoint, device=device, gpus=gpus, topology=topology)
        deployment.check()
    plan = StudioPlan(settings, deployment, workers, voices)
    with Studio(plan, lambda line: out.print(line, soft_wrap=True, markup=False)) as running:
        out.print(f"studio: [bold]{running.url}[/] (page), {running.url}/docs (API); Ctrl-C ends it", soft_wrap=True)
        running.attend()


def _keys(file: Path) -> tuple[str, ...]:
    """The keys in a file, one a line. Raises InputError."""
    try:
        keys = tuple(line.strip() for line in file.read_text("ascii").splitlines() if line.strip())
    except OSError as error:
        raise InputError(f"--keys-file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--keys-file {file} holds a character that is not ASCII: keys are ASCII") from None
    if not keys:
        raise InputError(f"--keys-file {file} holds no key: write one a line, such as from `openssl rand -hex 20`")
    return keys
