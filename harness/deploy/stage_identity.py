"""Asks a server what its stages compute with: device, type of numbers, GPU, code and versions."""

from __future__ import annotations

import struct

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from harness import wire
from harness.client.response_parser import is_final, outputs_of
from harness.errors import ServerError
from harness.identity import StageIdentity, from_json

TIMEOUT_S = 20.0


def stages_of(channel: grpc.Channel, address: str, headers=()) -> tuple[StageIdentity, ...]:
    """What every process of the server says of itself. Raises ServerError where it does not tell."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    try:
        stream = stub.ModelStreamInfer(iter([_request()]), timeout=TIMEOUT_S, metadata=headers)
        told = _description(stream, address)
        return from_json(told)
    except grpc.RpcError as error:
        raise ServerError(f"the server at {address} does not say what its stages run on: {error.details()}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ServerError(f"the server at {address} says of its stages what cannot be read: {error!r}") from error


def _description(stream, address: str) -> str:
    for message in stream:
        if message.error_message:
            raise ServerError(
                f"the server at {address} does not say what its stages run on: {message.error_message}; its model "
                "repository is of another version: give it the model_repository/ and the package of this harness"
            )
        told = outputs_of(message.infer_response).get(wire.DESCRIPTION)
        if told:
            stream.cancel()
            (size,) = struct.unpack_from("<I", told)  # Triton's form of a string
            return told[4 : 4 + size].decode()
        if is_final(message.infer_response):
            break
    raise ValueError("no description before the end of the stream")


def _request() -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=wire.ENTRY)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    inputs = {
        wire.TEXT_INPUT: ("BYTES", struct.pack("<I", 0)),
        wire.SPEAKER_IDS: ("INT32", struct.pack("<i", wire.NO_VOICE)),
        wire.DESCRIBE: ("BOOL", b"\x01"),
    }
    for name, (kind, content) in inputs.items():
        request.inputs.add(name=name, datatype=kind, shape=[1])
        request.raw_input_contents.append(content)
    return request
