"""A server of Triton's protocol whose audio depends on seed and frame alone, and that keeps and resumes sessions.

It stands in for a model: a text resumed from a carry goes on with the frames that an unbroken run would have.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
from fake_triton import inputs_of
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from harness import wire


@dataclass
class Conduct:
    """How it speaks. Numbers count down: a fault happens so many times.

    ``busy``: requests that find no room; ``refuse``: a message that nobody may speak this; ``breaks``: requests that
    fail after ``breaks_after`` frames; ``ends_at``: the frame at which a text that ends by itself ends;
    ``holds_at``: the frame before which it waits until ``go_on`` is set.
    """

    frame_s: float = 0.0
    busy: int = 0
    refuse: str = ""
    breaks: int = 0
    breaks_after: int = 3
    ends_at: int = 1 << 30
    holds_at: int = 1 << 30
    go_on: threading.Event = field(default_factory=threading.Event)
    speaking: int = 0
    most_speaking: int = 0
    requests: list[dict] = field(default_factory=list)


def frame(seed: int, index: int) -> np.ndarray:
    """The samples [3200] of a frame."""
    return np.random.default_rng([seed, index]).uniform(-1, 1, wire.SAMPLES_PER_FRAME).astype("<f4")


def unbroken(seed: int, frames: int) -> np.ndarray:
    """The 16-bit samples of a run without segments."""
    audio = np.concatenate([frame(seed, index) for index in range(frames)])
    return (np.clip(audio, -1, 1) * 32767).astype("<i2")


class SpeakingTriton(GRPCInferenceServiceServicer):
    """Serves ``conduct``, which may change at any time. In threads: two event loops of gRPC delay each other."""

    def __init__(self, conduct: Conduct):
        self.conduct = conduct
        self._counting = threading.Lock()

    def ServerReady(self, request, context):
        return pb.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):
        return pb.ModelReadyResponse(ready=True)

    def ModelStatistics(self, request, context):
        return pb.ModelStatisticsResponse()

    def ModelStreamInfer(self, request_iterator, context):
        for request in request_iterator:
            inputs = inputs_of(request)
            if not inputs.get(wire.DESCRIBE):
                yield from self._answer(inputs, context)

    def _answer(self, inputs, context):
        conduct = self.conduct
        conduct.requests.append({name: value for name, value in inputs.items() if name != wire.CARRY})
        if conduct.refuse:
            yield _error(f"{wire.REFUSED}{conduct.refuse}")
        elif conduct.busy:
            conduct.busy -= 1
            yield _error(f"{wire.BUSY}no room")
        else:
            with self._counted():
                yield from self._frames(inputs, context)

    @contextmanager
    def _counted(self):
        with self._counting:
            self.conduct.speaking += 1
            self.conduct.most_speaking = max(self.conduct.most_speaking, self.conduct.speaking)
        try:
            yield
        finally:
            with self._counting:
                self.conduct.speaking -= 1

    def _frames(self, inputs, context):
        conduct, first = self.conduct, 0
        seed, script = int(inputs[wire.SEED][0]), inputs[wire.TEXT_INPUT]
        if carry := inputs.get(wire.CARRY):
            kept = json.loads(bytes(carry))
            first, seed = kept["frames"], kept["seed"]
            assert kept["script"] == script
        breaks, conduct.breaks = conduct.breaks > 0, max(0, conduct.breaks - 1)
        frames = int(inputs[wire.FRAMES][0])
        if inputs.get(wire.UNTIL_END):
            frames = max(0, min(frames, conduct.ends_at - first))
        for index in range(first, first + frames):
            if breaks and index - first == conduct.breaks_after:
                yield _error("the decoder ran out of memory")
                return
            time.sleep(conduct.frame_s)
            while index >= conduct.holds_at and context.is_active() and not conduct.go_on.wait(0.01):
                pass
            if not context.is_active():
                return
            yield _audio(index - first, frame(seed, index))
        if inputs.get(wire.KEEP):
            kept = json.dumps({"script": script, "seed": seed, "frames": first + frames}).encode()
            yield _response([(wire.CARRY, "UINT8", len(kept), kept)])
        final = pb.ModelStreamInferResponse()
        final.infer_response.parameters["triton_final_response"].bool_param = True
        yield final


def _error(message: str) -> pb.ModelStreamInferResponse:
    return pb.ModelStreamInferResponse(error_message=message)


def _audio(index: int, samples: np.ndarray) -> pb.ModelStreamInferResponse:
    return _response(
        [
            (wire.AUDIO_OUTPUT, "FP32", len(samples), samples.tobytes()),
            (wire.FRAME_INDEX, "INT32", 1, struct.pack("<i", index)),
            (wire.SENT_AT_NS, "INT64", 1, struct.pack("<q", 1)),
        ]
    )


def _response(outputs) -> pb.ModelStreamInferResponse:
    response = pb.ModelStreamInferResponse()
    infer = response.infer_response
    for name, datatype, size, raw in outputs:
        infer.outputs.add(name=name, datatype=datatype, shape=[size])
        infer.raw_output_contents.append(raw)
    return response


@dataclass
class Served:
    """A server that speaks: its address, and how to end it."""

    url: str
    server: grpc.Server

    def kill(self) -> None:
        self.server.stop(None).wait()


@contextmanager
def speaking(conduct: Conduct):
    """Serve in threads of this process."""
    server = grpc.server(ThreadPoolExecutor(32))
    add_GRPCInferenceServiceServicer_to_server(SpeakingTriton(conduct), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    served = Served(f"127.0.0.1:{port}", server)
    try:
        yield served
    finally:
        served.kill()
