"""What a user is told of a configuration that was not loaded."""

from types import SimpleNamespace

import grpc.aio
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2_grpc

from harness import wire
from harness.deploy.control import load_changes
from harness.errors import ServerError


@pytest.mark.parametrize(
    ("code", "details", "told"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "no such key", f"refused the new configuration of {wire.LLM}: no such key"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", f"ended while it loaded the new configuration of {wire.LLM}"),
        (grpc.StatusCode.UNAVAILABLE, "this protocol is restricted, expecting header", "give its key with --header"),
    ],
)
def test_a_load_that_fails_tells_whether_triton_refused_it_or_ended(monkeypatch, code, details, told):
    def result():
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)

    load = SimpleNamespace(future=lambda *_, **__: SimpleNamespace(result=result))
    monkeypatch.setattr(
        service_pb2_grpc, "GRPCInferenceServiceStub", lambda channel: SimpleNamespace(RepositoryModelLoad=load)
    )
    before = {wire.LLM: model_config_pb2.ModelConfig(name=wire.LLM)}
    after = {wire.LLM: model_config_pb2.ModelConfig(name=wire.LLM, max_batch_size=2)}
    with pytest.raises(ServerError, match=told):
        load_changes(None, before, after)
