"""An external server, which the harness did not start: a sweep sets its knobs and restores them afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from harness import wire
from harness.client.replicas import described
from harness.client.target import Target
from harness.clock import HOST, Clock
from harness.content import SCHEMA, current
from harness.deploy.config import Configs, Deployment, as_json, from_json, topology_of
from harness.deploy.control import config_of, is_ready, load_changes
from harness.deploy.stage_identity import stages_of
from harness.deploy.statistics import prometheus
from harness.errors import InputError, ServerError
from harness.host.keys import control_headers
from harness.identity import Requested, must_be_as_requested

_METRICS_PORT = 8002  # Triton's default


class RemoteTriton:
    """A Triton that the harness did not start, with our repository. Use it as a context manager.

    Only the knobs of a sweep are set, on top of the server's own configurations, which are restored on exit. ``keep``
    is a file that holds them meanwhile: after a kill, the next to enter with that file restores them. The server is
    never started or stopped. Raises ServerError where it is not ready or does not serve what is ``requested``;
    InputError where it does not serve all ``topologies`` to be measured. ``metrics_url``: its Prometheus page, by
    default on Triton's standard port; None if it has none.
    """

    pid = metrics_url = None

    def __init__(self, url: str, requested: Requested, keep: Path | None = None, topologies: Sequence[str] = ()):
        self._topologies = topologies
        self.target, self.requested, self._keep = Target.from_environment(url), requested, keep
        if len(self.target.addresses) > 1:
            raise InputError(f"{url}: sweeps change one server's configuration: give exactly one --url")
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
            entry = config_of(stub, wire.ENTRY)
            self._must_run_at_its_own_speed(entry)
            self.topology = topology_of(entry)
            for topology in self._topologies:  # before anything is measured
                self.must_have(topology)
            self.loaded = {model: config_of(stub, model) for model in wire.TOPOLOGIES[self.topology]}
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
        with contextlib.suppress(ServerError):  # it may have ended
            self._load(self.found)
            if self._keep:
                self._keep.unlink(missing_ok=True)

    def _must_run_at_its_own_speed(self, entry: model_config_pb2.ModelConfig) -> None:
        """Raise InputError for a server with time dilation: the knobs set there would not be dilated."""
        if Clock.of(entry.parameters[wire.DILATION].string_value) != HOST:
            raise InputError(
                f"{self.url} runs with time dilation, and a sweep sets delays: leave --url out, and give --dilate to "
                "have such a server started here"
            )

    def _write_kept(self) -> None:
        if self._keep is None:
            return
        try:
            configs = {model: as_json(config) for model, config in self.found.items()}
            self._keep.write_text(json.dumps({"schema": SCHEMA, "configs": configs}))
        except OSError as error:
            raise ServerError(f"{self._keep} cannot be written: {error.strerror}; free or repair the disk") from error

    def _kept(self) -> Configs | None:
        """The server's original configurations, where a killed sweep left changed ones in it."""
        try:
            kept = json.loads(self._keep.read_text()) if self._keep else {}
            configs = current(kept)["configs"] if "schema" in kept else kept  # of an older harness
        except (OSError, ValueError):
            return None
        return {model: from_json(text) for model, text in configs.items()} or None

    def reload(self, deployment: Deployment) -> list[str]:
        """Set the knobs of a deployment; loads the models whose configuration changes, and returns their names."""
        self.must_have(deployment.topology)
        configs = {model: model_config_pb2.ModelConfig() for model in self.found}
        for model, config in configs.items():
            config.CopyFrom(self.found[model])
        return self._load(deployment.turn(configs))

    def must_have(self, topology: str) -> None:
        """Raise InputError for a topology that the server does not serve: no reload can change that."""
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
            raise ServerError(described(error, self.url, self.target.tls)) from error

    def _load(self, configs: Configs) -> list[str]:
        with self._channel() as channel:
            changed = load_changes(channel, self.loaded, configs, control_headers(self.url))
        self.loaded = configs
        return changed
