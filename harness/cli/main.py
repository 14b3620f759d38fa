"""The ``harness`` command: parse and call.

A command imports what it needs when it runs, so that ``harness --help`` does not import torch or pandas.
"""

from __future__ import annotations

import inspect
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from harness import exit_codes
from harness.cli import cards, day, exporting, fleet, measuring, results, serving, studio
from harness.cli.app import app, out, say_aside, shown
from harness.errors import HarnessError, InputError, ServerError
from harness.host.places import scenario_files

COMMANDS = (
    measuring,
    results,
    day,
    fleet,
    serving,
    studio,
    cards,
    exporting,
)  # importing each adds its commands to the app
UsageError: Any = typer.BadParameter.__base__  # typer carries a click of its own and does not export this one


@app.command(epilog="Example: `locust -f $(harness scenarios podcast) --headless -u 4 -t 20s`")
def scenarios(
    name: Annotated[str, typer.Argument(help="Print only the path of this one, for use in another command.")] = "",
    copy: Annotated[Path | None, typer.Option("--copy", help="Copy it, or all of them, to this folder.")] = None,
) -> None:
    """List the scenarios, plans, mixes and scripts that come with the harness, or copy them for editing."""
    files = scenario_files()
    if name:
        files = {found: path for found, path in files.items() if name in (found, str(Path(found).with_suffix("")))}
        if not files:
            raise InputError(f"there is no scenario {name!r}: use one of {', '.join(scenario_files())}")
    if copy:
        _copy(files, copy)
    elif name:
        print(*files.values())
    else:
        table = Table("name", "path", box=None)
        for found, path in files.items():
            table.add_row(found, str(shown(path)))
        out.print(table)


def _copy(files: dict[str, Path], folder: Path) -> None:
    """Copy files to their names below a folder. Raises InputError, before anything is written, where one exists."""
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise InputError(f"{folder / there[0]} already exists: give --copy another folder, or move the file")
    try:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; give --copy another folder") from None
    out.print(f"{len(files)} files in {folder}", soft_wrap=True)


def _say_whole_help() -> None:
    """Make help show every docstring whole: fold its paragraphs, and read no bracket as markup."""
    for command in app.registered_commands:
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = escape("\n\n".join(" ".join(each.split()) for each in paragraphs))


_say_whole_help()


def main() -> None:
    """Run the command line.

    A usage error is one message; SIGTERM or Ctrl-C ends cleanly; an internal error never returns a verdict code.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(signum, _as_interrupt)
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        error.show()
        sys.exit(exit_codes.USAGE)
    except HarnessError as error:
        say_aside(f"harness: {error}", "red")
        sys.exit(exit_codes.UNAVAILABLE if isinstance(error, ServerError) else exit_codes.USAGE)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(exit_codes.INTERRUPTED)
    except Exception:
        traceback.print_exc()
        sys.exit(exit_codes.INTERNAL)


def _as_interrupt(*_) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):  # a second signal would interrupt the clean-up, which is short
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt
