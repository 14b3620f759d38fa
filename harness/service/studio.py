"""The whole service on one machine: Redis, Triton, front and workers, started and ended together."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness import wire
from harness.deploy.config import Deployment
from harness.deploy.ports import free_ports, must_be_free
from harness.deploy.server import TritonServer
from harness.errors import InputError, ServerError
from harness.host.places import CODE
from harness.host.process_group import end_group, signals_held, spawn
from harness.service.redis_server import RedisServer
from harness.service.settings import PREFIX, StudioSettings
from harness.service.storage import AudioStore
from harness.service.voices import lay_out

_MOST_SHORT, _SHORT_S = 5, 20.0  # lives of a part this short in a row, before the studio gives up
_READY_S, _END_S, _LOOK_S = 60.0, 8.0, 0.3
_WORKER_END_S = 15.0  # a worker gives its tasks back
Say = Callable[[str], None]


@dataclass(frozen=True)
class StudioPlan:
    """What to start: ``deployment`` None uses the Triton of ``settings.url``; a Redis is started unless
    ``settings.redis`` names one. ``voices``: a folder of sound files for the started Triton, "" for synthetic ones."""

    settings: StudioSettings
    deployment: Deployment | None
    workers: int = 1
    voices: str = ""

    def __post_init__(self):
        if not 1 <= self.workers <= 64:
            raise InputError(f"--workers {self.workers} must lie in 1 to 64")


class Program:
    """A front or a worker: a process of this package, with its log in the studio's folder."""

    def __init__(self, module: str, name: str, settings: StudioSettings, end_s: float = _END_S):
        self.name, self._module, self._settings, self._end_s = name, module, settings, end_s
        self.log = Path(settings.folder) / "logs" / f"{name}.log"
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.log.exists():  # why it ended is in there
            self.log.replace(self.log.with_suffix(".previous.log"))
        self._process = spawn([sys.executable, "-m", self._module], self.log, environment=_environment(self._settings))

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        if self._process is not None:
            end_group(self._process, self._end_s)

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1][-300:] if lines else "it logged nothing"


class Studio:
    """A context manager that starts everything; ``attend`` then restarts what ends, until it is interrupted."""

    def __init__(self, plan: StudioPlan, say: Say = print):
        self.plan, self._say = plan, say
        self.settings = plan.settings
        self.redis: RedisServer | None = None
        self.triton: TritonServer | None = None
        self.front: Program | None = None
        self.workers: list[Program] = []
        self._stack = contextlib.ExitStack()
        self._lives: dict[str, tuple[float, int]] = {}

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "::", "localhost") else self.settings.host
        return f"http://{host}:{self.settings.port}"

    def __enter__(self) -> Studio:
        try:
            with signals_held():
                self._begin()
            self._start_triton()
            with signals_held():
                self._start_programs()
            self._until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """End everything, in the opposite order. Safe to call twice."""
        with signals_held():
            self._stack.close()

    def attend(self) -> None:
        """Restart parts that end by themselves. Raises ServerError where one ends again and again."""
        while True:
            self.look()
            time.sleep(_LOOK_S)

    def look(self) -> None:
        """Restart what has ended since the last look."""
        if self.redis and not self.redis.alive():
            self._again("Redis", self.redis.start)
        if self.triton:
            for line in self.triton.restarts():
                self._say(line)
            if not self.triton.alive():
                self._say(self.triton.last_words())
                self._again("Triton", self.triton.restart)
        for program in (self.front, *self.workers):
            if program and not program.alive():
                self._say(f"{program.name}: {program.last_words()}")
                self._again(program.name, program.start)

    def _again(self, name: str, start: Callable[[], object]) -> None:
        began_s, short = self._lives.get(name, (0.0, 0))
        short = short + 1 if time.monotonic() - began_s < _SHORT_S else 1
        if short >= _MOST_SHORT:
            raise ServerError(f"{name} ended {short} times in a row within {_SHORT_S:g} s, and is not restarted")
        self._say(f"{name} ended; restarting it")
        start()
        self._lives[name] = time.monotonic(), short

    def _begin(self) -> None:
        """Take the folder, choose the port, and start Redis."""
        folder = Path(self.settings.folder).absolute()
        self._stack.enter_context(_sole(folder))
        AudioStore(self.settings.storage_url)  # refuses one that cannot be used
        port = must_be_free(self.settings.port) if self.settings.port else free_ports(1)[0]
        self.settings = replace(self.settings, folder=str(folder), port=port)
        if not self.settings.redis:
            self.redis = RedisServer(folder / "redis")
            self._stack.callback(self.redis.stop)
            self.redis.start()
            self.settings = replace(self.settings, redis=self.redis.url)
            self._say(f"Redis: {folder / 'redis'} (append-only file), pid {self.redis.pid}")

    def _start_triton(self) -> None:
        deployment = self.plan.deployment
        if deployment is None:
            self._say(f"Triton: {self.settings.url}")
            return
        voices = Path(self.settings.folder) / "voices"
        lay_out(voices, self.plan.voices)
        deployment = replace(deployment, voices=str(voices))
        self._say(f"starting Triton with preset {deployment.preset} …")
        self.triton = TritonServer(deployment)
        self._stack.callback(self.triton.stop)
        self.triton.start()
        until_end = self.settings.until_end or bool(deployment.checkpoint)
        self.settings = replace(self.settings, url=self.triton.url, voices=str(voices), until_end=until_end)
        topology = "" if deployment.topology == wire.STAGED else f", {deployment.topology}"
        self._say(f"Triton: preset {deployment.preset}{topology} at {self.triton.url}")

    def _start_programs(self) -> None:
        self.front = Program("harness.service.front", "front", self.settings)
        self.workers = [
            Program("harness.service.worker", f"worker-{number}", self.settings, _WORKER_END_S)
            for number in range(1, self.plan.workers + 1)
        ]
        for program in (self.front, *self.workers):
            self._stack.callback(program.stop)
            program.start()
        self._say(f"workers: {len(self.workers)}, {self.settings.jobs_at_once} tasks at once each")

    def _until_ready(self) -> None:
        """Wait until the front answers, a worker has given a sign of life, and the servers are ready."""
        deadline = time.monotonic() + _READY_S
        while why := self._why_not_ready():
            for program in (self.front, *self.workers):
                if program and not program.alive():
                    raise ServerError(f"{program.name} ended while starting: {program.last_words()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the studio was not ready after {_READY_S:g} s: {why}; logs: {self.settings.folder}/logs"
                )
            time.sleep(0.1)

    def _why_not_ready(self) -> str:
        """What the front says, "" where it is ready."""
        try:
            connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", "/readyz")
                answer = connection.getresponse()
                return "" if answer.status == 200 else answer.read().decode(errors="replace")
        except OSError as error:
            return f"the front does not answer ({error})"


@contextlib.contextmanager
def _sole(folder: Path) -> Iterator[None]:
    """Only one studio uses a folder at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise InputError(f"--folder {folder} cannot be written: {error.strerror}; give another one") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"a studio runs in {folder} already: stop it, or give another --folder") from None
        yield


def _environment(settings: StudioSettings) -> dict[str, str]:
    """This process's environment, with these settings and this code."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    search = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH", ""))))
    return {**rest, **settings.environment(), "PYTHONPATH": search}
