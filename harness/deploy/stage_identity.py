"""Asks a server what its stages compute with: device, dtype, GPU, code and versions."""

from __future__ import annotations

import grpc
from tritonclient.grpc import service_pb2_grpc

from harness.client.channels import status_of
from harness.client.probe import describe_message, description_in
from harness.client.response_parser import is_final
from harness.errors import ServerError
from harness.identity import StageIdentity, from_json

TIMEOUT_S = 20.0


def stages_of(channel: grpc.Channel, address: str, headers=()) -> tuple[StageIdentity, ...]:
    """What every process of the server reports about itself. Raises ServerError where it does not answer."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    try:
        stream = stub.ModelStreamInfer(iter([describe_message()]), timeout=TIMEOUT_S, metadata=headers)
        told = _description(stream, address)
        return from_json(told)
    except grpc.RpcError as error:
        _, told = status_of(error)
        raise ServerError(f"the server at {address} does not report what its stages run on: {told}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ServerError(f"the server at {address} describes its stages in an unknown form: {error!r}") from error


def _description(stream, address: str) -> str:
    for message in stream:
        if message.error_message:
            raise ServerError(
                f"the server at {address} does not report what its stages run on: {message.error_message}; its model "
                "repository has another version: give it the model_repository/ and the package of this harness"
            )
        if told := description_in(message):
            stream.cancel()
            return told
        if is_final(message.infer_response):
            break
    raise ValueError("the stream ended without a description")
