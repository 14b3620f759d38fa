"""Hosts of a Ray cluster: an actor on each, with its own Triton beside the load generator.

Every host needs this package installed at the same version; the plan is sent to the actor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.errors import InputError
from harness.identity import StageIdentity
from harness.planfile.reading import load_plan
from harness.sweep.trial import Driver, Measured, TrialRequest
from harness.sweep.workers import Host, HostLost, TrialAborted

START_S = 300.0  # for a server of a large model
STOP_S = 30.0


def ray_hosts(address: str, plan_path: Path, base: Deployment) -> list[RayHost]:
    """A host for every node of the cluster that has a GPU; for every node if none has one.

    ``address`` as ``ray.init`` takes it (``auto`` = the cluster of this machine). Raises InputError without Ray, or
    where no cluster answers.
    """
    ray = _ray()
    try:
        ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {address}: no cluster answered: {str(error).splitlines()[0]}") from error
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with_gpu = [node for node in nodes if node["Resources"].get("GPU")]
    enough = [node for node in with_gpu if node["Resources"]["GPU"] >= base.gpus]
    if with_gpu and not enough and not base.emulate:
        most = max(int(node["Resources"]["GPU"]) for node in with_gpu)
        raise InputError(
            f"--ray {address}: the plan needs gpus: {base.gpus}, but no node has more than {most}: lower gpus"
        )
    return [RayHost(ray, node, plan_path, base) for node in enough or with_gpu or nodes]


def _ray():
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray, which is not installed here: pip install '.[ray]'") from None
    return ray


class RayHost(Host):
    """A host whose server and load generator run in an actor on one node."""

    def __init__(self, ray, node: Mapping[str, Any], plan_path: Path, base: Deployment):
        self._ray, self._node, self._plan_path, self._base = ray, node, plan_path, base
        self.name, self.ours = f"ray:{node['NodeManagerAddress']}:{node['NodeID'][:6]}", True
        self._aborted = False

    def __enter__(self) -> RayHost:
        strategies = self._ray.util.scheduling_strategies
        here = strategies.NodeAffinitySchedulingStrategy(self._node["NodeID"], soft=False)
        gpus = self._base.gpus if self._node["Resources"].get("GPU") and not self._base.emulate else 0
        # two concurrent calls: one runs a trial, the other may abort it
        actor = self._ray.remote(Worker).options(scheduling_strategy=here, num_gpus=gpus, max_concurrency=2)
        self._actor = actor.remote(str(self._plan_path.resolve()), self._plan_path.read_text(), self._base)
        self._url = self._ask(self._actor.start.remote(), START_S)
        return self

    def __exit__(self, *_) -> None:
        try:
            self._ask(self._actor.close.remote(), STOP_S)
        except HostLost:
            pass  # its server ended with it
        finally:
            self._ray.kill(self._actor)

    @property
    def url(self) -> str:
        return self._url

    @property
    def stages(self) -> tuple[StageIdentity, ...]:
        return self._ask(self._actor.stages.remote())

    def run(self, request: TrialRequest) -> Measured:
        measured = self._ask(self._actor.run.remote(request))
        if self._aborted:
            raise TrialAborted(f"a trial on {self.name} was aborted")
        return measured

    def recover(self) -> None:
        self._url = self._ask(self._actor.recover.remote(), START_S)

    def abort(self) -> None:
        self._aborted = True
        self._actor.abort.remote()

    def _ask(self, answer, timeout_s: float | None = None):
        """The answer of the actor. Raises its error, or HostLost where the node is lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer, timeout=timeout_s)
        except errors.RayTaskError as error:
            raise error.cause from None
        except (errors.RayActorError, errors.GetTimeoutError) as error:
            raise HostLost(f"{self.name} is lost: {str(error).splitlines()[0]}") from error


class Worker:
    """The actor on a node: it runs a host there."""

    def __init__(self, plan_path: str, plan: str, base: Deployment):
        self._folder = tempfile.TemporaryDirectory(prefix="harness-ray-")
        scratch, path = Path(self._folder.name), Path(plan_path)
        if not path.is_file() or path.read_text() != plan:
            path = scratch / path.name
            path.write_text(plan)
        spec = load_plan(path)
        self._host = Host(
            "worker",
            lambda: TritonServer(base),
            lambda server: Driver(server, path, spec, scratch / "trial", base),
            ours=True,
        )

    def start(self) -> str:
        self._host.__enter__()
        return self._host.url

    def stages(self) -> tuple[StageIdentity, ...]:
        return self._host.stages

    def run(self, request: TrialRequest) -> Measured:
        return self._host.run(request)

    def recover(self) -> str:
        self._host.recover()
        return self._host.url

    def abort(self) -> None:
        self._host.abort()

    def close(self) -> None:
        self._host.__exit__()
        self._folder.cleanup()
