"""What a Triton container deploys and how it is reached: from ``HARNESS_DEPLOY_*`` in the environment."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from harness import wire
from harness.deploy.config import Deployment
from harness.deploy.control import CONTROL_HEADER, KEY_NAME, RESTRICTED, Headers
from harness.deploy.flags import BACKEND_THREADS, GPU_BACKEND_THREADS, server_flags
from harness.errors import InputError
from harness.identity import GPU

PREFIX = "HARNESS_DEPLOY_"
GRPC_PORT, METRICS_PORT = 8001, 8002
_KEY = re.compile(r"[A-Za-z0-9_-]{20,}")  # a comma or a colon would end it in Triton's flag
_OWN_FLAGS = ("--backend-directory", "--http-address", "--grpc-address", "--metrics-address", "--exit-timeout-secs")


@dataclass(frozen=True, kw_only=True)
class ContainerSettings:
    """The settings of a Triton container. Raises InputError naming the variable.

    ``preset`` to ``parameters`` are those of ``Deployment``; ``knobs`` and ``parameters`` are JSON objects.
    ``key_file``: the key of calls that change the server; needed where ``address`` is not loopback. ``folder``: where
    the repository is written. ``exit_s``: how long sessions may go on after SIGTERM, in seconds; ``settle_s``: until
    clients know that the server ends; ``grace_s``: until a drain that could not be done is an error, in seconds, less
    than the grace period of the container. ``server``: the program; ``backends``: its folder of backends, its own
    where "".
    """

    preset: str = "tiny"
    checkpoint: str = ""
    voices: str = ""
    topology: str = wire.STAGED
    device: str = "auto"
    dtype: str = "auto"
    gpus: int = 1
    knobs: str = ""
    parameters: str = ""
    key_file: str = ""
    folder: str = "/run/harness"
    address: str = "0.0.0.0"
    grpc_port: int = GRPC_PORT
    metrics_port: int = METRICS_PORT
    exit_s: int = 30
    settle_s: float = 15.0
    grace_s: float = 5670.0
    server: str = "tritonserver"
    backends: str = ""

    def __post_init__(self):
        if not self.key_file and self.address not in ("127.0.0.1", "::1", "localhost"):
            raise InputError(
                f"{variable('key_file')} is not set, and {self.address} can be reached from other hosts: whoever "
                "reaches the server could load models, that is, execute code. Mount a secret, or set "
                f"{variable('address')}=127.0.0.1"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ContainerSettings:
        known = {variable(each.name): each for each in fields(cls)}
        if extra := sorted(name for name in environment if name.startswith(PREFIX) and name not in known):
            raise InputError(f"{extra[0]} is not a setting: use one of {', '.join(sorted(known))}")
        set_ones = {name: each for name, each in known.items() if environment.get(name)}
        given: dict[str, Any] = {
            each.name: _parsed(name, each.default, environment[name]) for name, each in set_ones.items()
        }
        return cls(**given)

    @property
    def models(self) -> Path:
        return Path(self.folder) / "models"

    @property
    def url(self) -> str:
        """Where a process of the same container reaches the server."""
        return f"{'127.0.0.1' if self.address == '0.0.0.0' else self.address}:{self.grpc_port}"

    def deployment(self) -> Deployment:
        parameters = {name: str(value) for name, value in _table("parameters", self.parameters).items()}
        return Deployment(
            self.preset, self.checkpoint, self.voices, knobs=_table("knobs", self.knobs), parameters=parameters,
            gpus=self.gpus, device=self.device, dtype=self.dtype, topology=self.topology,
        )  # fmt: skip

    def key(self) -> str:
        """The key of calls that change the server, "" where none is set. Raises InputError for one that is unusable."""
        if not self.key_file:
            return ""
        try:
            key = Path(self.key_file).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not ASCII"
            raise InputError(f"{variable('key_file')} {self.key_file} cannot be read: {why}") from None
        if not _KEY.fullmatch(key):
            raise InputError(
                f"{variable('key_file')} {self.key_file} must hold at least 20 letters, digits, '-' or '_': make one "
                "with `openssl rand -hex 32`"
            )
        return key

    def keep_key(self) -> None:
        """Keep the key with which a server starts: its secret may be replaced while it runs."""
        self._kept_key.unlink(missing_ok=True)
        with os.fdopen(os.open(self._kept_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.key())

    def started_headers(self) -> Headers:
        """The key with which the server of this container started as a header, for calls of a process beside it."""
        try:
            key = self._kept_key.read_text("ascii")
        except FileNotFoundError:
            key = self.key()
        return ((CONTROL_HEADER, key),) if key else ()

    @property
    def _kept_key(self) -> Path:
        return Path(self.folder) / "control.key"

    def command(self) -> list[str]:
        """The tritonserver command, with the flags of every start but those that say where it listens."""
        threads = GPU_BACKEND_THREADS if self.deployment().kind == GPU else BACKEND_THREADS
        flags = [
            each for each in server_flags(self.models, Path(self.backends), threads) if not each.startswith(_OWN_FLAGS)
        ]
        flags += [f"--backend-directory={self.backends}"] if self.backends else []
        flags += [f"--grpc-address={self.address}", f"--grpc-port={self.grpc_port}", "--allow-http=false"]
        flags += [f"--metrics-address={self.address}", f"--metrics-port={self.metrics_port}"]
        flags.append(f"--exit-timeout-secs={self.exit_s}")
        if key := self.key():
            flags.append(f"--grpc-restricted-protocol={RESTRICTED}:{KEY_NAME}={key}")
        return [self.server, *flags]


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def _parsed(name: str, default: Any, text: str) -> Any:
    try:
        return type(default)(text)
    except ValueError:
        raise InputError(f"{name} is {text!r}: it must be a number") from None


def _table(setting: str, text: str) -> dict:
    try:
        table = json.loads(text or "{}")
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise InputError(f'{variable(setting)} is no JSON object: write {{"NAME": VALUE, ...}}')
    return table
