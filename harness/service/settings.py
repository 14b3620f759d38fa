"""The settings of the job service: from ``HARNESS_STUDIO_*`` in the environment, replaced by options of the command."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from harness import wire
from harness.errors import InputError
from harness.host.places import ROOT

PREFIX = "HARNESS_STUDIO_"
FOLDER = ROOT / ".harness" / "studio"
LEAST_KEY = 20  # characters
_ANY_ADDRESS = ("0.0.0.0", "::")


@dataclass(frozen=True, kw_only=True)
class StudioSettings:
    """How the front and the workers run; checked when built. Raises InputError naming the variable.

    ``url``: Triton's gRPC addresses, commas between. ``redis``: a redis:// URL. ``folder``: state of the studio;
    ``storage``: where audio goes, any URL of fsspec (default: a folder in ``folder``). ``voices``: the folder of voices
    that the servers have, "" for their four synthetic ones. ``hosts``: names in the Host header that are accepted
    besides ``host``. ``keys``: the keys that callers may use; without any, the service listens on loopback only.

    Jobs: ``segment_s`` seconds of audio per segment, ``jobs_at_once`` per worker process, ``lease_s`` after which a
    silent worker loses its task, ``sessions`` of the target that streams and jobs share (0 = not known), ``tries`` of
    one segment before its task fails. ``until_end``: the model decides where a text ends (released checkpoints).

    Limits: per key ``open_tasks`` and ``open_streams`` at once, ``per_minute`` requests that make speech; bytes of a
    script and of an uploaded voice; seconds of a voice; ``speech_s`` of audio in one synchronous request; ``body_s``
    until a request's body must have arrived; ``retention_days`` until a task and its audio are deleted; ``patience_s``
    until a stream that finds no room is refused. ``private_webhooks`` allows addresses of private networks.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    hosts: tuple[str, ...] = ()
    keys: tuple[str, ...] = field(default=(), repr=False)
    url: str = ""
    redis: str = field(default="", repr=False)
    folder: str = str(FOLDER)
    storage: str = ""
    voices: str = ""
    until_end: bool = False
    segment_s: float = 120.0
    jobs_at_once: int = 2
    lease_s: float = 15.0
    sessions: int = 0
    tries: int = 5
    open_tasks: int = 50
    open_streams: int = 20
    per_minute: int = 60
    script_bytes: int = 600_000
    voice_bytes: int = 16 << 20
    voice_s: float = 60.0
    speech_s: float = 900.0
    body_s: float = 30.0
    patience_s: float = 20.0
    retention_days: float = 7.0
    private_webhooks: bool = False

    def __post_init__(self):
        for name, low, high in _LIMITS:
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{variable(name)} is {value}: it must lie in {low:g} to {high:g}")
        for key in self.keys:
            if len(key) < LEAST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
                raise InputError(
                    f"{variable('keys')} holds a key that is too weak: use at least {LEAST_KEY} printable ASCII "
                    "characters without spaces, such as the output of `openssl rand -hex 20`"
                )
        if not self.keys and not is_loopback(self.host):
            raise InputError(
                f"{variable('host')} {self.host} can be reached from other hosts, so callers need a key: give keys in "
                f"{variable('keys')} (commas between), or listen on 127.0.0.1"
            )

    @property
    def storage_url(self) -> str:
        return self.storage or str(Path(self.folder) / "audio")

    @property
    def segment_frames(self) -> int:
        return max(1, round(self.segment_s * wire.FRAMES_PER_SECOND))

    @property
    def host_names(self) -> tuple[str, ...]:
        """Names and addresses by which callers reach this service; empty accepts any."""
        if self.host in _ANY_ADDRESS and not self.hosts:
            return ()
        return tuple(name.lower() for name in (self.host, "localhost", "127.0.0.1", "[::1]", *self.hosts))

    def environment(self) -> dict[str, str]:
        """The variables from which ``from_environment`` makes the same settings."""
        return {variable(each.name): _text(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, **given: Any) -> StudioSettings:
        """Settings from the environment; ``given`` ones that are not None replace them. Raises InputError."""
        known = {variable(each.name): each.name for each in fields(cls)}
        values = {name: _parsed(name, environment[key]) for key, name in known.items() if environment.get(key)}
        if extra := [key for key in environment if key.startswith(PREFIX) and key not in known]:
            raise InputError(f"{extra[0]} is not a setting: use one of {', '.join(sorted(known))}")
        return cls(**{**values, **{name: value for name, value in given.items() if value is not None}})


_LIMITS = (
    ("port", 0, 65_535), ("segment_s", 0.1, 5400), ("jobs_at_once", 1, 256), ("lease_s", 0.5, 600),
    ("sessions", 0, 1_000_000), ("tries", 1, 1000), ("open_tasks", 1, 1_000_000),
    ("open_streams", 1, 1_000_000), ("per_minute", 1, 1_000_000),
    ("script_bytes", 100, 10_000_000), ("voice_bytes", 1000, 1 << 30), ("voice_s", 1, 600), ("speech_s", 1, 5400),
    ("body_s", 0.1, 600), ("patience_s", 0.1, 600), ("retention_days", 0.0001, 3650),
)  # fmt: skip
_DEFAULTS = {each.name: each.default for each in fields(StudioSettings)}


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else ""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _parsed(name: str, text: str) -> Any:
    kind = type(_DEFAULTS[name])
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
            raise InputError(f"{variable(name)} is {text!r}: use 1 or 0")
        return text.lower() in ("1", "true", "yes")
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise InputError(f"{variable(name)} is {text!r}: it must be {wanted}") from None
