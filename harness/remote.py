"""The options of a target on the `harness` command line: written once, for every command that opens connections."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from harness.targets import OPTIONS, Target, options_in_environment

_PANEL = "The server (each option also as LOCUST_NAME in the environment)"


def with_target(command: Callable) -> Callable:
    """A command with a parameter ``target: Target | None``, as one with ``--url`` and OPTIONS: None without a URL."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    options = {"url": _option("--url", "HOST:PORT; several repeated or with commas; grpcs:// is TLS.", several=True)}
    for name, about in OPTIONS.items():
        options[_name(name)] = _option(name, about["help"], about["metavar"], about.get("action") == "append")

    @functools.wraps(command)
    def with_options(**values):
        given = {name: values.pop(name) for name in options}
        urls = given.pop("url")
        asked = {**options_in_environment(), **{name: value for name, value in given.items() if value}}
        return command(**values, target=Target.from_options(urls, asked) if urls else None)

    kept = [parameter for parameter in parameters if parameter.name != "target"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]
    with_options.__signature__ = inspect.Signature([*kept, *added])
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
    return with_options


def _option(flag: str, words: str, metavar: str = "URL", several: bool = False):
    kind = list[str] if several else str
    return Annotated[kind | None, typer.Option(flag, help=words, metavar=metavar, rich_help_panel=_PANEL)]


def _name(flag: str) -> str:
    return flag.strip("-").replace("-", "_")
