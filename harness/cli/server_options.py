"""The options of servers on the `harness` command line, defined once for every command that opens connections."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from harness.client.target import (
    OPTIONS,
    URL_VARIABLE,
    Target,
    as_environment,
    options_in_environment,
    urls_in_environment,
)
from harness.errors import InputError

_PANEL = "The server (each option also as LOCUST_NAME in the environment)"
ONE_AT_A_TIME = ("--balance",)  # of OPTIONS: meaningless where each server is measured or checked by itself


@dataclass(frozen=True)
class Servers:
    """Servers named by options or the environment, and how to connect to them.

    ``options``: those of OPTIONS by name, including the environment's; ``given``: those of the command line only.
    """

    urls: tuple[str, ...]
    options: Mapping[str, str | list[str]]
    given: Mapping[str, str | list[str]]
    from_environment: bool = False

    def target(self, otherwise: str | None = None) -> Target | None:
        """The target of the URLs, or ``otherwise`` where none is given. Raises InputError."""
        urls = self.urls or ((otherwise,) if otherwise else ())
        return Target.from_options(urls, self.options) if urls else None

    def measured(self) -> str:
        """The URLs with commas between, for trials, one at a time on each; "" where none is given.

        The options are put into this process's environment, where the connections and the Locust of every trial read
        them. Raises InputError for unusable ones.
        """
        if self.given and not self.urls:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in self.given)
            raise InputError(f"{named}: these options need --url; the server started here does not use them")
        urls = [url for each in self.urls for url in map(str.strip, each.split(",")) if url]
        for url in urls:
            Target.from_options(url, self.options)
        os.environ.update(as_environment(self.given))
        os.environ.pop(URL_VARIABLE, None)  # the Locust of a trial is told which server to use
        if not urls:  # a server started here uses plain text, whatever is set for others
            for name in [name for name in os.environ if name.startswith("LOCUST_TLS_")]:
                del os.environ[name]
        return ",".join(urls)


NO_SERVERS = Servers((), {}, {})


def with_servers(command: Callable | None = None, *, without: tuple[str, ...] = (), url_help: str = "") -> Callable:
    """Wrap a command with a parameter ``servers: Servers`` as one with ``--url`` and OPTIONS, except some of them."""
    if command is None:
        return functools.partial(with_servers, without=without, url_help=url_help)
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    about_url = url_help or "HOST:PORT; several repeated or with commas; grpcs:// is TLS."
    options = {"url": _option("--url", about_url, several=True)}
    for name, about in OPTIONS.items():
        if name not in without:
            options[_name(name)] = _option(name, about["help"], about["metavar"], about.get("action") == "append")

    def with_options(**values):
        given = {name: value for name in options if (value := values.pop(name))}
        return command(**values, servers=_servers(given))

    wrapped: Any = functools.wraps(command)(with_options)
    kept = [parameter for parameter in parameters if parameter.name != "servers"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]
    wrapped.__signature__ = inspect.Signature([*kept, *added])
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
    return wrapped


def _servers(given: dict[str, str | list[str]]) -> Servers:
    urls = tuple(given.pop("url", ()))
    named = urls or urls_in_environment()
    return Servers(named, {**options_in_environment(), **given}, given, from_environment=bool(named and not urls))


def _option(flag: str, words: str, metavar: str = "URL", several: bool = False):
    option = typer.Option(flag, help=words, metavar=metavar, rich_help_panel=_PANEL)
    return Annotated[list[str] | None, option] if several else Annotated[str | None, option]


def _name(flag: str) -> str:
    return flag.strip("-").replace("-", "_")
