"""The ``harness`` command line: its app, and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from harness.errors import InputError
from harness.report.screen import Screen

if TYPE_CHECKING:
    from harness.records.store import Run

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
TOPOLOGY_HELP = (
    "staged (each stage a Triton model, joined by an ensemble) or fused (all stages in one process, sessions stepped "
    "together)"
)
PlanTopology = Annotated[str, typer.Option("--topology", help=f"Replaces the plan's topology: {TOPOLOGY_HELP}.")]
PlanDilation = Annotated[
    str,
    typer.Option(
        "--dilate",
        metavar="N|auto",
        help="Replaces the plan's dilate: run emulated GPUs N times slower, and report undilated figures. auto: the "
        "smallest factor that takes less than 60% of this host.",
    ),
]
Measured = Annotated[
    bool, typer.Option("--no-emulate", help="Measure this host's own device, where the plan emulates one.")
]
SERVERS_HELP = "Use a running Triton (HOST:PORT). With several, each runs one trial at a time."
Ray = Annotated[
    str,
    typer.Option("--ray", help="A Ray cluster (auto, or its address): each of its GPU hosts runs one trial at a time."),
]


def say_aside(words: str, style: str) -> None:
    Console(stderr=True).print(words, style=style, markup=False, highlight=False, soft_wrap=True)


def opened(folder: Path) -> Run:
    """A stored run. If it was signed and then changed, or has expired, a warning is printed beside the answer."""
    from harness.records.store import Run
    from harness.report.facts import is_signed
    from harness.report.seal import check_seal

    stored = Run.open(folder)
    if is_signed(stored) and (problems := check_seal(folder).problems):
        say_aside(f"This run failed verification: {'; '.join(problems)}", "yellow")
    return stored


def rates_of(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(",") if part.strip())
        if text and not rates:
            raise ValueError(text)
    except ValueError:
        raise InputError(f"--qps {text!r}: give rates with commas between them, such as 0.5,1,5") from None
    if any(not 0 < rate <= _MAX_QPS for rate in rates):
        raise InputError(f"--qps {text!r}: every rate must be above 0 and at most {_MAX_QPS:g}")
    return rates


def shown(path: Path) -> Path:
    """A path, relative to the current folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
