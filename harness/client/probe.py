"""Asks, while a stream is silent, whether the process that serves its request has ended.

Triton (2.51) does not tell a stream that the process serving it has died. New requests get an error at once, and the
process that replaces it is younger than the request.
"""

from __future__ import annotations

import json
import struct
import time

import grpc.aio
from tritonclient.grpc import service_pb2 as pb

from harness import wire
from harness.client.replicas import Replica
from harness.client.response_parser import is_final, outputs_of

STUB_GONE = f"Stub process '{wire.ENTRY}"  # start of Triton's message about a dead process
_TIMEOUT_S = 3.0


def describe_message() -> pb.ModelInferRequest:
    """A request for a description of the server's processes instead of for speech."""
    request = pb.ModelInferRequest(model_name=wire.ENTRY)
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


def description_in(message: pb.ModelStreamInferResponse) -> str | None:
    """The JSON of a description; None for another response."""
    told = outputs_of(message.infer_response).get(wire.DESCRIPTION)
    if not told:
        return None
    (size,) = struct.unpack_from("<I", told)  # Triton's encoding of a string
    return told[4 : 4 + size].decode()


async def entry_ended(replica: Replica, sent_ns: int) -> bool:
    """Whether the entry's process has ended since a request was sent to it; False where the server does not say."""
    elapsed_s = (time.monotonic_ns() - sent_ns) / 1e9
    message = describe_message().SerializeToString()
    call = replica.stream_infer(message, timeout=_TIMEOUT_S, metadata=replica.target.headers)
    try:
        while (data := await call.read()) is not grpc.aio.EOF:
            response = pb.ModelStreamInferResponse.FromString(data)
            if response.error_message:
                return STUB_GONE in response.error_message
            if told := description_in(response):
                return is_younger(told, elapsed_s)
            if is_final(response.infer_response):
                return False
    except (grpc.aio.AioRpcError, ValueError, TypeError, AttributeError, struct.error):
        return False
    finally:
        call.cancel()
    return False


def is_younger(description: str, elapsed_s: float) -> bool:
    """Whether all processes of the entry are younger than ``elapsed_s``, so that an older one must have ended."""
    ages = [each.get(wire.AGE_S) for each in json.loads(description) if each.get("model") == wire.ENTRY]
    return bool(ages) and all(age is not None and age < elapsed_s for age in ages)
