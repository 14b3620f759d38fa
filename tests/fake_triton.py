"""A small server of Triton's gRPC protocol that speaks on a fixed timetable: the network's one seam in fast tests.

As a program (``python tests/fake_triton.py --interval 0.1333``) it prints its address and serves until stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from harness import wire


@dataclass
class Timetable:
    """When chunks leave, counted from the request's arrival, and how the stream goes wrong if it is to."""

    first_s: float = 0.0
    interval_s: float = 0.0
    stalls: dict[int, float] = field(default_factory=dict)  # chunk index -> extra seconds before it
    stop_after: int | None = None  # chunks after which the stream ends with its final response
    fail_after: int | None = None  # chunks after which an error message is sent
    hang_after: int | None = None  # chunks after which nothing more comes
    error: str = "the decoder ran out of memory"
    open_s: float = 0.0  # from an error message to the end of its stream
    carry: bytes = b""  # sent after the last chunk, in two pieces
    emulated: bool = False  # said in the first chunk
    beat_s: float | None = None  # said in the first chunk, and not kept
    description: str | None = "[]"  # the answer to a request that asks for it; None = an error like a dead process's
    ready: bool = True
    model_ready: bool = True
    dilation: float = 1.0  # of the configuration; times above are those of the host
    config_error: tuple[grpc.StatusCode, str] | None = None  # instead of the configuration


def inputs_of(request: pb.ModelInferRequest) -> dict[str, object]:
    """The tensors of a request, decoded."""
    dtypes = {"INT32": "<i4", "INT64": "<i8", "FP32": "<f4", "BOOL": "?", "UINT8": "u1"}
    values = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            (size,) = struct.unpack("<I", raw[:4])
            values[tensor.name] = raw[4 : 4 + size].decode("utf-8")
        else:
            values[tensor.name] = np.frombuffer(raw, dtypes[tensor.datatype]).reshape(tensor.shape).tolist()
    return values


def audio_response(
    first_frame: int, samples: int, emulated: bool = False, beat_s: float | None = None
) -> pb.ModelStreamInferResponse:
    outputs = [
        (wire.AUDIO_OUTPUT, "FP32", samples, bytes(4 * samples)),
        (wire.FRAME_INDEX, "INT32", 1, struct.pack("<i", first_frame)),
        (wire.SENT_AT_NS, "INT64", 1, struct.pack("<q", time.monotonic_ns())),
    ]
    if emulated and not first_frame:
        outputs.append((wire.EMULATED, "BOOL", 1, b"\x01"))
    if beat_s and not first_frame:
        outputs.append((wire.BEAT_S, "FP32", 1, struct.pack("<f", beat_s)))
    return _response(outputs)


def _response(outputs) -> pb.ModelStreamInferResponse:
    response = pb.ModelStreamInferResponse()
    infer = response.infer_response
    for name, datatype, size, raw in outputs:
        infer.outputs.add(name=name, datatype=datatype, shape=[size])
        infer.raw_output_contents.append(raw)
    return response


class FakeTriton(GRPCInferenceServiceServicer):
    """Serves ``timetable``; ``requests`` keeps the decoded inputs, ``cancelled`` counts clients that left."""

    def __init__(self, timetable: Timetable):
        self.timetable = timetable
        self.requests: list[dict[str, object]] = []
        self.cancelled = 0

    async def ServerReady(self, request, context):
        return pb.ServerReadyResponse(ready=self.timetable.ready)

    async def ModelReady(self, request, context):
        return pb.ModelReadyResponse(ready=self.timetable.model_ready and request.name == wire.ENTRY)

    async def ModelConfig(self, request, context):
        if self.timetable.config_error:
            await context.abort(*self.timetable.config_error)
        answer = pb.ModelConfigResponse()
        answer.config.parameters[wire.DILATION].string_value = f"{self.timetable.dilation:g}"
        return answer

    async def ModelStatistics(self, request, context):
        answer = pb.ModelStatisticsResponse()
        answer.model_stats.add(name=wire.ENTRY, inference_count=len(self.requests))
        return answer

    async def ModelStreamInfer(self, request_iterator, context):
        arrived_s = time.monotonic()
        try:
            async for request in request_iterator:
                self.requests.append(inputs_of(request))
                async for response in self._speak(self.requests[-1], arrived_s):
                    yield response
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _described(self) -> pb.ModelStreamInferResponse:
        if self.timetable.description is None:
            gone = f"Failed to process the request(s), message: Stub process '{wire.ENTRY}_0_0' is not healthy."
            return pb.ModelStreamInferResponse(error_message=gone)
        text = self.timetable.description.encode()
        return _response([(wire.DESCRIPTION, "BYTES", 1, struct.pack("<I", len(text)) + text)])

    async def _speak(self, inputs, arrived_s):
        table = self.timetable
        if inputs.get(wire.DESCRIBE):
            yield self._described()
            return
        frames, size = inputs.get(wire.FRAMES, [4])[0], inputs[wire.CHUNK_FRAMES][0]
        due_s = arrived_s + table.first_s
        for index, first in enumerate(range(0, frames, size)):
            if index == table.fail_after:
                yield pb.ModelStreamInferResponse(error_message=table.error)
                await asyncio.sleep(table.open_s)
                return
            if index == table.hang_after:
                await asyncio.Event().wait()
            if index == table.stop_after:
                break
            due_s += table.stalls.get(index, 0.0)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            samples = min(size, frames - first) * wire.SAMPLES_PER_FRAME
            yield audio_response(first, samples, table.emulated, table.beat_s)
            due_s += table.interval_s
        for piece in filter(None, (table.carry[:3], table.carry[3:])):
            yield _response([(wire.CARRY, "UINT8", len(piece), piece)])
        final = pb.ModelStreamInferResponse()
        final.infer_response.parameters["triton_final_response"].bool_param = True
        yield final


async def start(fake: FakeTriton, port: int = 0) -> tuple[grpc.aio.Server, str]:
    """A started server and its address, on 127.0.0.1; port 0 takes a free one."""
    server = grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(fake, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, f"127.0.0.1:{bound}"


@contextmanager
def serving(timetable: Timetable):
    """Serve from a thread of this process: yields the FakeTriton with its ``url``, and ``kill()`` to end it early."""
    fake, loop, started = FakeTriton(timetable), asyncio.new_event_loop(), threading.Event()

    async def boot():
        fake.server, fake.url = await start(fake)
        started.set()

    def run():
        loop.run_until_complete(boot())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait(120)
    fake.kill = lambda: asyncio.run_coroutine_threadsafe(fake.server.stop(None), loop).result(120)
    try:
        yield fake
    finally:
        fake.kill()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(120)
        loop.close()


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--first", type=float, default=0.1, help="seconds to the first chunk")
    parser.add_argument("--interval", type=float, default=wire.SECONDS_PER_FRAME, help="seconds between chunks")
    options = parser.parse_args()
    fake = FakeTriton(Timetable(first_s=options.first, interval_s=options.interval))
    server, url = await start(fake, options.port)
    print(url, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main())
