"""Calls that ask a server whether it is ready, and calls that change what it has loaded."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from harness import wire
from harness.client.channels import status_of
from harness.deploy.config import Configs, as_json
from harness.errors import ServerError

RESTRICTED = "model-repository,shared-memory,trace,logging"  # calls that change a server need its key
KEY_NAME = "harness"
CONTROL_HEADER = f"triton-grpc-protocol-{KEY_NAME}"  # the header in which Triton expects the key

Headers = tuple[tuple[str, str], ...]


def load_changes(channel: grpc.Channel, before: Configs, after: Configs, headers: Headers = ()) -> list[str]:
    """Load the models whose configuration differs, the stages concurrently; returns their names.

    Raises ServerError where the server refuses one, or ends.
    ``headers``: must include the key if the server restricts model control.
    """
    changed = [model for model in after if before[model] != after[model]]
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    callers = (wire.ENTRY, wire.FRAME)  # last: loading a stage also reloads the models that call it
    for models in ([model for model in changed if model not in callers], *([m] for m in callers if m in changed)):
        loads = [(model, _begin_load(stub, model, as_json(after[model]), headers)) for model in models]
        for model, load in loads:
            _end_load(model, load)
    return changed


def has_open_control(channel: grpc.Channel, headers: Headers = (), timeout_s: float = 5.0) -> bool:
    """Whether a server lets any client load models, that is, execute code on its host.

    It only requests the list of models. False also where the server cannot be asked. ``headers``: those of a proxy
    before the server.
    """
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    try:
        stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=timeout_s, metadata=headers or None)
    except grpc.RpcError:
        return False
    return True


def is_ready(stub, models: Iterable[str]) -> bool:
    """Whether the server answers and has loaded these models."""
    try:
        if not stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=5).ready:
            return False
        return all(stub.ModelReady(service_pb2.ModelReadyRequest(name=m), timeout=5).ready for m in models)
    except grpc.RpcError:
        return False


def config_of(stub, model: str) -> model_config_pb2.ModelConfig:
    try:
        return stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), timeout=10).config
    except grpc.RpcError as error:
        raise ServerError(f"Triton did not return the configuration of {model}: {status_of(error)[1]}") from error


def _begin_load(stub, model: str, config_json: str, headers: Headers) -> grpc.Future:
    request = service_pb2.RepositoryModelLoadRequest(model_name=model)
    request.parameters["config"].string_param = config_json
    return stub.RepositoryModelLoad.future(request, timeout=120, metadata=headers or None)


def _end_load(model: str, load: grpc.Future) -> None:
    try:
        load.result()
    except grpc.RpcError as error:
        code, told = status_of(error)
        if code is grpc.StatusCode.UNAVAILABLE and "restricted" not in told:
            raise ServerError(f"Triton ended while it loaded the new configuration of {model}: {told}") from error
        fix = f"; give its key with --header @FILE, a line '{CONTROL_HEADER}: KEY'" if "restricted" in told else ""
        raise ServerError(f"Triton refused the new configuration of {model}: {told}{fix}") from error
