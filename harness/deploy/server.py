"""The local Triton server: start it, wait until it is ready, reload a stage, stop it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from tritonclient.grpc import service_pb2_grpc

from harness import wire
from harness.client.target import Target
from harness.deploy import stub as stub_python
from harness.deploy.config import Deployment, write_repository
from harness.deploy.control import CONTROL_HEADER, KEY_NAME, RESTRICTED, Headers, is_ready, load_changes
from harness.deploy.distribution import Distribution, find_distribution, server_environment
from harness.deploy.flags import (
    BACKEND_THREADS,
    EXIT_TIMEOUT_S,
    GPU_BACKEND_THREADS,
    MOST_STRETCH,
    START_S,
    server_flags,
)
from harness.deploy.leftovers import remove_environments, remove_shared_memory, remove_stale, shm_prefix_of
from harness.deploy.ports import free_ports, must_be_free
from harness.deploy.running import STATE, STATE_NAME, ServerState, process_mark
from harness.deploy.stage_identity import stages_of
from harness.deploy.start_watch import StartWatch
from harness.deploy.unary import without_unary_call
from harness.errors import ServerError
from harness.host.keys import remove_keys, server_mark, write_control_key, write_private
from harness.host.places import CODE, ROOT
from harness.host.process_group import end_group, hide_argument, is_launched, signals_held, spawn
from harness.identity import GPU, Requested, StageIdentity, must_be_as_requested

_END_S = EXIT_TIMEOUT_S + 2.0
_ABORT_S = 10.0  # from its last log line to its end
_CRASH = re.compile(rb"^Signal \((?:4|6|7|8|11)\) received", re.MULTILINE)
_FRAME = re.compile(r"\s*\d+# ")  # of a stack
_CRASH_S = 3.0  # from that line until the process is killed
_NICE = 5  # lower priority than the load generator: late timestamps would falsify the results


class _AtRest(ServerError):
    """It will never be ready: see ``StartWatch``."""


class TritonServer:
    """One tritonserver process on loopback that serves a deployment; use it as a context manager.

    Attributes: ``url`` (gRPC host:port), ``metrics_url``, ``pid``, ``folder`` (configurations and log), ``stages``
    (what each of its processes reports that it runs on), ``control_headers`` (the key of calls that change it).
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        root: Path = ROOT,
        public: bool = False,
        port: int | None = None,
    ):
        self.deployment = deployment
        self.public = public  # others on this machine may find it by local_url()
        self.port = port
        self.control_headers: Headers = ((CONTROL_HEADER, secrets.token_hex(32)),)
        remove_stale(root)
        self._root = root
        self._ports: tuple[int, int] | None = None  # of gRPC and metrics, once started
        self._mark = ""  # identity of the server's process, for its keys
        self._forget()

    def _forget(self) -> None:
        """Reset what belongs to a process that has ended."""
        self.folder = self._root / STATE / f"triton-{os.getpid()}-{time.monotonic_ns():x}"
        self.shm_prefix = shm_prefix_of(self.folder)
        self.log = self.folder / "tritonserver.log"
        self.stages: tuple[StageIdentity, ...] = ()
        self.kept_log: Path | None = None  # log of a server that ended without being stopped
        self._process: subprocess.Popen | None = None
        self._log_read = 0  # bytes: see ``restarts``
        self._crash_read, self._crashed_s = 0, None  # bytes; when its log said that it crashed: see ``alive``

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the tritonserver process. Raises ServerError where none was started."""
        if self._process is None:
            raise ServerError("this server is not started, and has no process: start it first")
        return self._process.pid

    def start(self, timeout_s: float = START_S) -> TritonServer:
        """Start, wait until every model is ready, and ask the stages what they run on.

        The time limit is that of a host with free CPUs: with more to run than CPUs it is longer in proportion, up to
        four times, since a server gives way to others.

        Raises ServerError with the server's own reason, or where a stage runs on something other than requested;
        InputError where this host lacks what the deployment needs.
        """
        self.deployment.check_host()
        found = find_distribution()
        stub_python.check(stub_python.search_path())
        grpc_port, metrics = self._ports = self._ports or self._choose_ports()
        self.url, self.metrics_url = f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{metrics}/metrics"
        self.target = Target.of(self.url)
        try:
            with signals_held() as interrupted:
                self._make_folder()
                self._python = stub_python.lay_out(self.folder / "python", stub_python.search_path())
                self._lay_out(found)
                ports = [f"--grpc-port={grpc_port}", f"--metrics-port={metrics}"]
                ports.append("--allow-http=false")  # it has no key, and a chunked request crashes it (2.51)
                self._run_until_ready(found, ports, timeout_s, interrupted)
                if not interrupted():
                    self.identify()
        except BaseException:
            self.stop()
            raise
        return self

    def _choose_ports(self) -> tuple[int, int]:
        grpc_port, metrics = free_ports(2)
        return (grpc_port if self.port is None else must_be_free(self.port)), metrics

    def restart(self) -> None:
        """Restart a server that ended by itself, with the same addresses, deployment and key. Raises as ``start``."""
        self.stop()
        self._forget()
        self.start()

    def reload(self, deployment: Deployment) -> list[str]:
        """Load the stages whose configuration changed, and no others; returns their names.

        Another topology means other models: the server is then restarted on new ports.
        """
        if deployment.topology != self.deployment.topology:
            self._ports = None
            return self._start_as(deployment)
        try:
            return self._load(deployment)
        except ServerError:
            if not self._aborted():
                raise
            self.stages = ()  # its end is explained, and its log need not be kept
            return self._start_as(deployment)

    def _load(self, deployment: Deployment) -> list[str]:
        with self.target.channel(self.url) as channel:
            changed = load_changes(channel, self.deployment.served(), deployment.served(), self.control_headers)
        self.deployment = deployment
        self.identify()
        return changed

    def _start_as(self, deployment: Deployment) -> list[str]:
        self.deployment = deployment
        self.restart()
        return list(deployment.models)

    def identify(self) -> None:
        """Set ``stages`` to what the stages report. Raises ServerError where it differs from what was requested."""
        asked = self.deployment
        kind = asked.kind
        requested = Requested(asked.preset, kind, asked.dtype, str(CODE), gpus=asked.gpus if kind == GPU else None)
        with self.target.channel(self.url) as channel:
            self.stages = stages_of(channel, self.url)
        must_be_as_requested(self.stages, requested, self.url)

    def alive(self) -> bool:
        """Whether it runs. One that crashed is killed: Triton's own handler may hang, and serves nobody then."""
        if self._process is None or self._process.poll() is not None:
            return False
        if self._crashed_s is None and self._says_that_it_crashed():
            self._crashed_s = time.monotonic()
        if self._crashed_s is None or time.monotonic() < self._crashed_s + _CRASH_S:
            return True
        end_group(self._process, 0.0)
        return False

    def _says_that_it_crashed(self) -> bool:
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            log.seek(self._crash_read)
            whole = log.read().rpartition(b"\n")[0]
            self._crash_read += len(whole)
            return bool(_CRASH.search(whole))
        return False

    def responds(self) -> bool:
        """Whether it is ready, with a timeout of some seconds: a server that hangs is alive but does not respond."""
        if not self.alive():
            return False
        with self.target.channel(self.url) as channel:
            return is_ready(service_pb2_grpc.GRPCInferenceServiceStub(channel), self.deployment.models)

    def stop(self) -> None:
        """Stop the server and its stage processes, and remove what they leave behind. Safe to call twice."""
        with signals_held():
            self._end()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        if self._process is not None:
            self._keep_log()
            end_group(self._process, _END_S)
            remove_keys(self._mark)
        remove_shared_memory(self.shm_prefix)

    def restarts(self) -> list[str]:
        """Restarts of model processes that its log reports since the last call."""
        told = (wire.LOADED_AGAIN, wire.NOT_LOADED)
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            log.seek(self._log_read)
            whole = log.read().rpartition(b"\n")[0]
            self._log_read += len(whole) + bool(whole)
            lines = whole.decode(errors="replace").splitlines()
            return [
                line for line in lines if line.startswith(tuple(m + t for m in self.deployment.models for t in told))
            ]
        return []

    def last_words(self) -> str:
        """How a server ended that was not stopped: exit status, last line of its log, and the log's path.

        Of a crash, what it said before the stack.
        """
        self._keep_log()
        code = self._process.poll() if self._process else None
        how = "" if code is None else f" by signal {-code}" if code < 0 else f" with exit status {code}"
        log = self.kept_log or self.log
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
        lines = [line for line in lines if not _FRAME.match(line)]
        if lines and _CRASH.match(lines[-1].encode()):
            lines = [" / ".join(line[-200:] for line in lines[-2:])]
        said = f"its last line: {lines[-1][-400:]}" if lines else "it logged nothing"
        return f"tritonserver ended{how}; {said}; its log: {log}"

    def _keep_log(self) -> None:
        """Keep the log of a server that was not stopped: nothing else says why it ended."""
        if self.kept_log is None and not self.alive() and self.log.exists() and self.stages:
            kept = self.folder.parent / f"{self.folder.name}.log"
            with contextlib.suppress(OSError):
                shutil.copy2(self.log, kept)
                self.kept_log = kept

    def _aborted(self) -> bool:
        """Whether it crashed on a lock shared with a stage, as Triton (2.51) sometimes does at a start or a reload."""
        if not self.log.exists() or "boost::interprocess::lock_exception" not in self.log.read_text(errors="replace"):
            return False
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ABORT_S)
        return not self.alive()

    def _run_until_ready(
        self, found: Distribution, ports: list[str], timeout_s: float, interrupted: Callable[[], bool]
    ) -> None:
        """Run it; again, up to twice, where Triton crashed on a shared lock or came to rest while it started."""
        for left in (2, 1, 0):
            try:
                return self._run(found, ports, timeout_s, interrupted)
            except _AtRest:
                if not left:
                    raise
            except ServerError:
                if not left or not self._aborted():
                    raise
            self._end()

    def _run(self, found: Distribution, ports: list[str], timeout_s: float, interrupted: Callable[[], bool]) -> None:
        began_s = time.time()
        self._log_read = self._crash_read = 0
        self._crashed_s = None
        self._launch(found, ports)
        self._write_state()
        try:
            self._wait_ready(timeout_s, interrupted)
        finally:
            remove_environments(began_s)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise ServerError(
                f"{self.folder.parent} cannot be written ({error.strerror}), and servers keep their files there: start "
                f"in another folder, or give this user write access to {self.folder.parent}"
            ) from error

    def _lay_out(self, found: Distribution) -> None:
        self._copy_programs(found)
        write_repository(self.folder / "models", self.deployment)

    def _copy_programs(self, found: Distribution) -> None:
        backend = self.folder / "backends" / "python"
        shutil.copytree(found.backend, backend)
        shutil.copy2(found.stub, backend)
        self._binary = self.folder / "tritonserver"
        if not without_unary_call(found.server, self._binary):
            print(f"harness: {found.server} keeps its unary call, with which a client may end it", file=sys.stderr)

    def _launch(self, found: Distribution, ports: list[str]) -> None:
        threads = GPU_BACKEND_THREADS if self.deployment.kind == GPU else BACKEND_THREADS
        command = [str(self._binary), *server_flags(self.folder / "models", self.folder / "backends", threads)]
        command += [*ports, f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}"]
        command.append(f"--grpc-restricted-protocol={RESTRICTED}:{KEY_NAME}={self.control_headers[0][1]}")
        environment = server_environment(found, self._python)
        # Triton (2.51) leaves a zombie of a stage process that died until the server ends.
        # And one that is told to end may crash and hang, as may stage processes in a call to it, once it has ended.
        self._process = spawn(command, self.log, niceness=_NICE, environment=environment, reaps=False, guarded_s=_END_S)
        self._mark = server_mark(self.pid)

    def _write_state(self) -> None:
        state = ServerState(
            owner=process_mark(os.getpid()),
            server=process_mark(self.pid),
            mark=self._mark,
            url=self.url,
            metrics_url=self.metrics_url,
            shm_prefix=self.shm_prefix,
            preset=self.deployment.preset,
            public=self.public,
        )
        (self.folder / STATE_NAME).unlink(missing_ok=True)
        write_private(self.folder / STATE_NAME, state.text())
        write_control_key(self.pid, self.url, *self.control_headers[0])

    def _wait_ready(self, timeout_s: float, interrupted: Callable[[], bool]) -> None:
        """Wait until all models are ready, or a signal has arrived (which the caller handles)."""
        began_s, key_shown, watch = time.monotonic(), True, StartWatch(self.pid)
        with self.target.channel(self.url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while (waited_s := time.monotonic() - began_s) < timeout_s * _crowding():
                if not self.alive():
                    raise ServerError(f"Triton ended while starting:\n{self._why()}")
                if key_shown and self._has_read_its_arguments():  # everybody can read its command line
                    key_shown = not hide_argument(self.pid, self.control_headers[0][1])
                if interrupted() or is_ready(stub, self.deployment.models):
                    return
                if watch.is_at_rest():
                    raise _AtRest(f"Triton waits for a process of its own that waits for it:\n{self._why()}")
                time.sleep(0.1)
        raise ServerError(f"Triton was not ready after {waited_s:.0f} s:\n{self._why()}")

    def _has_read_its_arguments(self) -> bool:
        """Whether Triton has started processes of its own. Its launcher may have had one too."""
        return is_launched(self.pid) and bool(psutil.Process(self.pid).children())

    def _why(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        telling = [line for line in lines if "failed to load" in line or "UNAVAILABLE" in line or "error:" in line]
        return "\n".join((telling or lines)[-5:])[-2000:]


def _crowding() -> float:
    """How many processes want to run for each CPU, by the load of the last minute: 1 to ``MOST_STRETCH``."""
    return min(MOST_STRETCH, max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0))))


@contextlib.contextmanager
def serving(preset: str = "tiny", *, root: Path = ROOT, **deployment) -> Iterator[TritonServer]:
    """A server for the length of a ``with`` block."""
    with TritonServer(Deployment(preset=preset, **deployment), root=root) as server:
        yield server
