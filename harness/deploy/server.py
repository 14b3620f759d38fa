"""The local Triton server: find it, start it, wait until it is ready, reload a stage, stop it, leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import grpc
import psutil
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from harness import wire
from harness.client.replicas import in_words
from harness.client.target import Target
from harness.deploy import stub as stub_python
from harness.deploy.config import (
    GPU_SESSIONS,
    Configs,
    Deployment,
    as_json,
    from_json,
    topology_of,
    write_repository,
)
from harness.deploy.stage_identity import stages_of
from harness.deploy.statistics import prometheus
from harness.errors import InputError, ServerError
from harness.host.keys import control_headers, remove_keys, server_mark, write_control_key, write_private
from harness.host.places import CODE, ROOT
from harness.host.process_group import end_group, hide_argument, signals_held, spawn
from harness.identity import GPU, Requested, StageIdentity, must_be_as_requested

_STATE = ".harness"
_EXIT_TIMEOUT_S = 2
_NICE = 5  # the server yields to the instrument that measures it: a late timestamp is a wrong figure
_BACKEND_THREADS, _GPU_BACKEND_THREADS = 512, 2 * GPU_SESSIONS + 64
_STUB_MEMORY = 16 << 20  # bytes, taken at once by every process: a frame on its way takes about 40 KB
_STUB_START_S = 300
_METRICS_PORT = 8002  # Triton's own choice
_SHARED_MEMORY = Path("/dev/shm")
_RESTRICTED = "model-repository,shared-memory,trace,logging"  # calls that change a server: they need its key
_KEY_NAME = "harness"
CONTROL_HEADER = f"triton-grpc-protocol-{_KEY_NAME}"  # in which Triton expects the key

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Distribution:
    """Where the installed wheel keeps the server, and what its Python stub needs to start."""

    server: Path
    backend: Path
    stub: Path
    libraries: tuple[Path, ...]


def find_distribution() -> Distribution:
    """The server of the nvidia-pytriton wheel. Raises ServerError that says what is missing and how to fix it."""
    found = find_files()
    return replace(found, libraries=(*found.libraries, libpython_folder()))


def find_files() -> Distribution:
    """The wheel's own part of ``find_distribution``: without the system's libpython."""
    try:
        package = Path(metadata.distribution("nvidia-pytriton").locate_file("pytriton"))
    except metadata.PackageNotFoundError:
        raise ServerError("the package nvidia-pytriton is not installed: pip install nvidia-pytriton==0.7.0") from None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(f"nvidia-pytriton has no stub for Python {version}: use Python 3.11 or 3.12")
    return Distribution(
        server=package / "tritonserver" / "bin" / "tritonserver",
        backend=package / "tritonserver" / "backends" / "python",
        stub=stub,
        libraries=(package.parent / "nvidia_pytriton.libs",),
    )


def libpython_folder() -> Path:
    """The folder of libpythonX.Y.so.1.0, which the stub links to."""
    name = libpython_name()
    for place in libpython_places():
        if (place / name).exists():
            return place
    raise ServerError(
        f"{name} is nowhere on this machine, and Triton's Python backend links to it: install your system's libpython "
        f"(Debian: apt install {name.partition('.so')[0]}), or name the folder that holds it in LD_LIBRARY_PATH"
    )


def libpython_name() -> str:
    return f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"


def libpython_places() -> list[Path]:
    """Where a libpython is looked for, in this order: an environment may carry one, and so may who starts us."""
    named = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    libdir = sysconfig.get_config_var("LIBDIR") or ""
    places = [libdir, f"{sys.base_prefix}/lib", f"{sys.prefix}/lib", *named, "/usr/lib/x86_64-linux-gnu", "/usr/lib"]
    return [Path(place) for place in dict.fromkeys(places) if place]


class TritonServer:
    """One tritonserver process on loopback with a deployment in it; use it as a context manager.

    Attributes: ``url`` (gRPC host:port), ``metrics_url``, ``pid``, ``folder`` (configurations and log), ``stages``
    (what each of its processes says that it runs on), ``control_headers`` (the key of calls that change it).
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
        self.folder = root / _STATE / f"triton-{os.getpid()}-{time.monotonic_ns():x}"
        self.shm_prefix = _shm_prefix(self.folder)
        self._mark = ""  # of the server's process, for its keys
        self.log = self.folder / "tritonserver.log"
        self.stages: tuple[StageIdentity, ...] = ()
        self.kept_log: Path | None = None  # of a server that ended and was not stopped
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, timeout_s: float = 300.0) -> TritonServer:
        """Start, wait until every model is ready, and hear from the stages what they run on.

        Raises ServerError with the server's own reason, or where a stage runs on something else than was asked for;
        InputError where this host has not what the deployment needs.
        """
        self.deployment.check_host()
        found = find_distribution()
        stub_python.check(stub_python.search_path())
        grpc_port, metrics = free_ports(2)
        if self.port is not None:
            grpc_port = _must_be_free(self.port)
        self.url, self.metrics_url = f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{metrics}/metrics"
        self.target = Target.of(self.url)
        try:
            with signals_held() as interrupted:
                self.folder.mkdir(parents=True, mode=0o700)
                self._python = stub_python.lay_out(self.folder / "python", stub_python.search_path())
                self._lay_out(found)
                ports = [f"--grpc-port={grpc_port}", f"--metrics-port={metrics}"]
                ports.append("--allow-http=false")  # it knows no key, and one chunked request ends that of Triton 2.51
                try:
                    self._run(found, ports, timeout_s, interrupted)
                except ServerError:
                    if not self._aborted():
                        raise
                    self._end()
                    self._run(found, ports, timeout_s, interrupted)
                if not interrupted():
                    self.identify()
        except BaseException:
            self.stop()
            raise
        return self

    def reload(self, deployment: Deployment) -> list[str]:
        """Load the stages whose configuration changed, and no other; returns their names.

        Another topology is another set of models: the server is started anew, on ports of its own.
        """
        if deployment.topology != self.deployment.topology:
            return self._start_as(deployment)
        with self.target.channel(self.url) as channel:
            changed = load_changes(channel, self.deployment.configs(), deployment.configs(), self.control_headers)
        self.deployment = deployment
        self.identify()
        return changed

    def _start_as(self, deployment: Deployment) -> list[str]:
        self.stop()
        self.deployment, self.kept_log, self._process, self.stages = deployment, None, None, ()
        self.start()
        return list(deployment.models)

    def identify(self) -> None:
        """Set ``stages`` to what the stages say of themselves. Raises ServerError where that was not asked for."""
        asked = self.deployment
        kind = asked.kind
        requested = Requested(asked.preset, kind, asked.dtype, str(CODE), gpus=asked.gpus if kind == GPU else None)
        with self.target.channel(self.url) as channel:
            self.stages = stages_of(channel, self.url)
        must_be_as_requested(self.stages, requested, self.url)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def responds(self) -> bool:
        """Whether it is ready, within some seconds: one that hangs is alive, and does not."""
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
            end_group(self._process, _EXIT_TIMEOUT_S + 2)
            remove_keys(self._mark)
        remove_shared_memory(self.shm_prefix)

    def last_words(self) -> str:
        """How a server ended that nobody stopped, the last line of its log, and where that is: facts for its user."""
        self._keep_log()
        code = self._process.poll() if self._process else None
        how = "" if code is None else f" by signal {-code}" if code < 0 else f" with exit status {code}"
        log = self.kept_log or self.log
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
        said = f"its last line: {lines[-1][-300:]}" if lines else "it logged nothing"
        return f"tritonserver ended{how}; {said}; its log: {log}"

    def _keep_log(self) -> None:
        """Keep the log of a server that nobody stopped: nothing else says why it ended."""
        if self.kept_log is None and not self.alive() and self.log.exists() and self.stages:
            kept = self.folder.parent / f"{self.folder.name}.log"
            with contextlib.suppress(OSError):
                shutil.copy2(self.log, kept)
                self.kept_log = kept

    def _aborted(self) -> bool:
        """Whether it ended as Triton (2.51) now and then does while it starts, of a lock shared with a stage."""
        return not self.alive() and "boost::interprocess::lock_exception" in self.log.read_text(errors="replace")

    def _run(self, found: Distribution, ports: list[str], timeout_s: float, interrupted: Callable[[], bool]) -> None:
        began_s = time.time()
        self._launch(found, ports)
        self._write_state()
        try:
            self._wait_ready(timeout_s, interrupted)
        finally:
            _remove_environments(began_s)

    def _lay_out(self, found: Distribution) -> None:
        backend = self.folder / "backends" / "python"
        shutil.copytree(found.backend, backend)
        shutil.copy2(found.stub, backend)
        write_repository(self.folder / "models", self.deployment)

    def _launch(self, found: Distribution, ports: list[str]) -> None:
        threads = _GPU_BACKEND_THREADS if self.deployment.kind == GPU else _BACKEND_THREADS
        command = [str(found.server), *server_flags(self.folder / "models", self.folder / "backends", threads)]
        command += [*ports, f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}"]
        command.append(f"--grpc-restricted-protocol={_RESTRICTED}:{_KEY_NAME}={self.control_headers[0][1]}")
        self._process = spawn(command, self.log, niceness=_NICE, environment=server_environment(found, self._python))
        self._mark = server_mark(self.pid)

    def _write_state(self) -> None:
        state = {
            "owner": process_mark(os.getpid()),
            "server": process_mark(self.pid),
            "mark": self._mark,
            "url": self.url,
            "metrics_url": self.metrics_url,
            "shm_prefix": self.shm_prefix,
            "preset": self.deployment.preset,
            "public": self.public,
        }
        (self.folder / "state.json").unlink(missing_ok=True)
        write_private(self.folder / "state.json", json.dumps(state))
        write_control_key(self.pid, self.url, *self.control_headers[0])

    def _wait_ready(self, timeout_s: float, interrupted: Callable[[], bool]) -> None:
        """Until all models are ready, or a signal has come, which is left to who holds it."""
        deadline, key_shown = time.monotonic() + timeout_s, True
        with self.target.channel(self.url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while time.monotonic() < deadline:
                if not self.alive():
                    raise ServerError(f"Triton ended while it was starting:\n{self._why()}")
                if key_shown and psutil.Process(self.pid).children():  # it has read its command, as everybody can
                    key_shown = not hide_argument(self.pid, self.control_headers[0][1])
                if interrupted() or is_ready(stub, self.deployment.models):
                    return
                time.sleep(0.1)
        raise ServerError(f"Triton was not ready after {timeout_s:.0f} s:\n{self._why()}")

    def _why(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        telling = [line for line in lines if "failed to load" in line or "UNAVAILABLE" in line or "error:" in line]
        return "\n".join((telling or lines)[-5:])[-2000:]


class RemoteTriton:
    """A Triton that somebody else runs, with our repository in it. Use it as a context manager.

    Only the knobs of a sweep are turned, in the configurations that it has; on leaving they are put back. ``keep`` is a
    file that holds them meanwhile: after a kill, the next to enter with it puts them back. It is never started or
    stopped. Raises ServerError where it is not ready, or does not serve what is ``requested``; InputError where it does
    not serve all ``topologies`` that are to be measured.
    ``metrics_url``: its Prometheus page, where Triton has it unless told otherwise; None where there is none.
    """

    pid = metrics_url = None

    def __init__(self, url: str, requested: Requested, keep: Path | None = None, topologies: Sequence[str] = ()):
        self._topologies = topologies
        self.target, self.requested, self._keep = Target.from_environment(url), requested, keep
        if len(self.target.addresses) > 1:
            raise InputError(f"{url}: the knobs of one server are turned, and one is measured: give one --url")
        self.url = self.target.url

    def __enter__(self) -> RemoteTriton:
        with self._channel() as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            self._must_answer(stub)
            if not is_ready(stub, (wire.ENTRY,)):
                raise ServerError(
                    f"no Triton with the models of model_repository/ is ready at {self.url}: check the address, or "
                    "leave --url out to have one started here"
                )
            self.topology = topology_of(_config_of(stub, wire.ENTRY))
            for topology in self._topologies:  # before anything is measured
                self.must_have(topology)
            self.loaded = {model: _config_of(stub, model) for model in wire.TOPOLOGIES[self.topology]}
        self.found = self._kept() or self.loaded
        served = self.found[wire.ENTRY].parameters["preset"].string_value
        if served != self.requested.preset:
            raise ServerError(
                f"{self.url} serves preset {served}, but the plan is for {self.requested.preset}: change one of them"
            )
        with self._channel() as channel:
            self.stages = stages_of(channel, self.url, self.target.headers)
        must_be_as_requested(self.stages, self.requested, self.url)
        self._write_kept()
        page = f"http://{self.target.addresses[0].rpartition(':')[0]}:{_METRICS_PORT}/metrics"
        self.metrics_url = page if prometheus(page) else None
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ServerError):  # it may be gone
            self._load(self.found)
            if self._keep:
                self._keep.unlink(missing_ok=True)

    def _write_kept(self) -> None:
        if self._keep is None:
            return
        try:
            self._keep.write_text(json.dumps({model: as_json(config) for model, config in self.found.items()}))
        except OSError as error:
            raise ServerError(f"{self._keep} cannot be written: {error.strerror}; free or repair the disk") from error

    def _kept(self) -> Configs | None:
        """Its own configurations, where a killed sweep left others in it."""
        try:
            kept = json.loads(self._keep.read_text()) if self._keep else None
        except (OSError, ValueError):
            return None
        return {model: from_json(text) for model, text in kept.items()} if kept else None

    def reload(self, deployment: Deployment) -> list[str]:
        """Turn the knobs of a deployment; loads the models whose configuration changes, and returns their names."""
        self.must_have(deployment.topology)
        configs = {model: model_config_pb2.ModelConfig() for model in self.found}
        for model, config in configs.items():
            config.CopyFrom(self.found[model])
        return self._load(deployment.turn(configs))

    def must_have(self, topology: str) -> None:
        """Raises InputError for a topology other than the one that it serves: no reload can change that."""
        if topology != self.topology:
            raise InputError(
                f"{self.url} serves the {self.topology} topology, and the plan asks for the {topology} one, which a "
                f"running server cannot change to: set topology: {self.topology} in the plan (and none in its space), "
                "give the --url of a server that is deployed so, or leave --url out to have servers started here"
            )

    def alive(self) -> bool:
        with self._channel() as channel:
            return is_ready(service_pb2_grpc.GRPCInferenceServiceStub(channel), self.loaded)

    responds = alive

    def _channel(self) -> grpc.Channel:
        return self.target.channel(self.target.addresses[0])

    def _must_answer(self, stub) -> None:
        try:
            stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=self.target.ready_s)
        except grpc.RpcError as error:
            raise ServerError(in_words(error, self.url, self.target.tls)) from error

    def _load(self, configs: Configs) -> list[str]:
        with self._channel() as channel:
            changed = load_changes(channel, self.loaded, configs, control_headers(self.url))
        self.loaded = configs
        return changed


def load_changes(channel: grpc.Channel, before: Configs, after: Configs, headers: Headers = ()) -> list[str]:
    """Load the models whose configuration differs, the stages side by side; returns their names.

    ``headers``: with the key of a server that has closed its model control.
    """
    changed = [model for model in after if before[model] != after[model]]
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    callers = (wire.ENTRY, wire.FRAME)  # last: loading a stage takes the models that call it along
    for models in ([model for model in changed if model not in callers], *([m] for m in callers if m in changed)):
        loads = [(model, _begin_load(stub, model, as_json(after[model]), headers)) for model in models]
        for model, load in loads:
            _end_load(model, load)
    return changed


def shared_memory_needed(configs: Configs, gpus: int = 1) -> int:
    """Bytes that a server takes of shared memory: a region for each stage process and one of its own.

    ``gpus``: on so many, each with the instances that a configuration counts.
    """
    stages = [config for config in configs.values() if config.backend == "python"]
    counts = [max(1, sum(group.count or 1 for group in config.instance_group)) for config in stages]
    return (gpus * sum(counts) + 1) * _STUB_MEMORY


def server_flags(models: Path, backends: Path, threads: int = _BACKEND_THREADS) -> list[str]:
    """Flags that every start uses: loopback only, explicit model control, quick and quiet."""
    return [
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
        "--log-info=false",
        # Each call of a stage and each chunk sent holds a thread of its instance: with the default of 32, sessions
        # beyond that would wait for a thread while the stages idle.
        f"--backend-config=python,thread-pool-size={threads}",
        # What a stage's process shares with the server should not have to grow (from 1 MiB): a server with 16 streams
        # ended so, by a thread that still had the smaller mapping (2.51).
        f"--backend-config=python,shm-default-byte-size={_STUB_MEMORY}",
        # The default of 30 s is too little on a busy host.
        f"--backend-config=python,stub-timeout-seconds={_STUB_START_S}",
        # Triton keeps the responses of a finished stream for the next one: after 90 minutes, half a gigabyte.
        "--grpc-infer-allocation-pool-size=0",
    ]


def server_environment(found: Distribution, python: Path | None = None) -> dict[str, str]:
    """The stub takes its packages from the first python3 on PATH, and its libpython from LD_LIBRARY_PATH.

    ``python``: the folder of that python3; None = this interpreter's own.
    """
    environment = dict(os.environ)
    environment["PATH"] = f"{python or Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    libraries = [str(folder) for folder in found.libraries] + [environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "1")
    environment["HF_HUB_OFFLINE"] = "1"
    return environment


@contextlib.contextmanager
def serving(preset: str = "tiny", *, root: Path = ROOT, **deployment) -> Iterator[TritonServer]:
    """A server for the length of a ``with`` block."""
    with TritonServer(Deployment(preset=preset, **deployment), root=root) as server:
        yield server


def local_url(root: Path = ROOT) -> str | None:
    """The gRPC address of the running ``harness serve``, or None. Raises InputError where several run."""
    urls = local_urls(root)
    if len(urls) > 1:
        raise InputError(
            f"{len(urls)} servers of `harness serve` run on this host: {', '.join(urls)}. Name the one that is meant "
            "with --url, or stop the others"
        )
    return urls[0] if urls else None


def local_urls(root: Path = ROOT) -> list[str]:
    """The gRPC address of every running ``harness serve``."""
    return sorted(state["url"] for state in _states(root) if state["public"] and is_alive(state["server"]))


def has_open_control(channel: grpc.Channel, headers: Headers = (), timeout_s: float = 5.0) -> bool:
    """Whether a server lets anybody who reaches it load models, which is to run code on its host.

    It only asks for the list of models. False also where it cannot be asked; ``headers``: of a proxy before it.
    """
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    try:
        stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=timeout_s, metadata=headers or None)
    except grpc.RpcError:
        return False
    return True


def remove_stale(root: Path = ROOT) -> None:
    """Remove what servers left behind whose owner was killed: processes, shared memory, folders."""
    for state in _states(root):
        if is_alive(state["owner"]):
            continue
        if is_alive(state["server"]):
            _kill_tree(psutil.Process(state["server"][0]))
        _end_orphans(state["shm_prefix"])
        remove_keys(state.get("mark", ""))
        remove_shared_memory(state["shm_prefix"])
        shutil.rmtree(state["folder"], ignore_errors=True)
    for folder in (root / _STATE).glob("triton-*/"):
        if not (folder / "state.json").exists() and not psutil.pid_exists(int(folder.name.split("-")[1])):
            _end_orphans(_shm_prefix(folder))  # killed before it had written its state
            remove_shared_memory(_shm_prefix(folder))
            shutil.rmtree(folder, ignore_errors=True)


def process_mark(pid: int) -> list:
    """A process as it can be told from a later one of the same number: pid and start, in seconds since boot."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [pid, round(psutil.Process(pid).create_time() - psutil.boot_time(), 1)]
    return [pid, -1.0]


def is_alive(mark: list) -> bool:
    return mark[1] >= 0 and process_mark(mark[0]) == list(mark)


def _shm_prefix(folder: Path) -> str:
    """How the names of a server's shared memory begin, by its folder: its processes carry it in their commands."""
    return f"harness_{folder.name.removeprefix('triton-').replace('-', '_')}_"


def _end_orphans(prefix: str) -> None:
    """End the stage processes of a server that is gone."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().effective == os.geteuid() and any(w.startswith(prefix) for w in process.cmdline()[1:4]):
                process.kill()


def _remove_environments(since_s: float) -> None:
    """Remove the empty folders that Triton makes as it starts, for packed environments that no stage of ours has."""
    for folder in Path("/tmp").glob("python_env_*"):
        with contextlib.suppress(OSError):  # one that holds something stays
            if folder.stat().st_uid == os.geteuid() and folder.stat().st_ctime >= since_s:
                folder.rmdir()


def remove_shared_memory(prefix: str) -> None:
    for region in _SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _must_be_free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a server that just ended is free
        try:
            probe.bind(("127.0.0.1", port))
        except OverflowError:
            raise ServerError(f"{port} is no port: use 1 to 65535, or leave --port out") from None
        except OSError as error:
            raise ServerError(
                f"port {port} cannot be used ({error.strerror}): choose another --port, or leave it out for a free one"
            ) from None
    return port


def is_ready(stub, models: Iterable[str]) -> bool:
    """Whether the server answers and has loaded these models."""
    try:
        if not stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=5).ready:
            return False
        return all(stub.ModelReady(service_pb2.ModelReadyRequest(name=m), timeout=5).ready for m in models)
    except grpc.RpcError:
        return False


def _config_of(stub, model: str) -> model_config_pb2.ModelConfig:
    try:
        return stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), timeout=10).config
    except grpc.RpcError as error:
        raise ServerError(f"Triton does not tell the configuration of {model}: {error.details()}") from error


def _begin_load(stub, model: str, config_json: str, headers: Headers) -> grpc.Future:
    request = service_pb2.RepositoryModelLoadRequest(model_name=model)
    request.parameters["config"].string_param = config_json
    return stub.RepositoryModelLoad.future(request, timeout=120, metadata=headers or None)


def _end_load(model: str, load: grpc.Future) -> None:
    try:
        load.result()
    except grpc.RpcError as error:
        told = error.details() or ""
        fix = f"; give its key with --header @FILE, a line '{CONTROL_HEADER}: KEY'" if "restricted" in told else ""
        raise ServerError(f"Triton refused the new configuration of {model}: {told}{fix}") from error


def _states(root: Path) -> list[dict]:
    states = []
    for file in (root / _STATE).glob("triton-*/state.json"):
        with contextlib.suppress(OSError, ValueError):
            states.append({**json.loads(file.read_text()), "folder": file.parent})
    return states


def _kill_tree(process: psutil.Process) -> None:
    for one in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
