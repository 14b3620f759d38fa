"""A process that reads streams with tritonclient under gevent, as a user's own Locust file would."""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()

import json
import os
import time

import gevent
import grpc.experimental.gevent
import numpy as np
import tritonclient.grpc as triton

from harness import wire

grpc.experimental.gevent.init_gevent()

SPREAD_S = 2.0  # over which the streams start


class User:
    """One client with one stream, whose callback timestamps each chunk."""

    def __init__(self, url: str, frames: int, chunks: list):
        self.client, self.chunks = triton.InferenceServerClient(url), chunks
        self.inputs = [
            tensor(wire.TEXT_INPUT, "BYTES", np.array([b"Speaker 1: Hello."], object)),
            tensor(wire.SPEAKER_IDS, "INT32", np.array([0], np.int32)),
            tensor(wire.FRAMES, "INT32", np.array([frames], np.int32)),
        ]

    def speak(self) -> None:
        self.client.start_stream(self.hear)
        self.client.async_stream_infer(wire.ENTRY, self.inputs)

    def hear(self, result, error) -> None:
        now_ns = time.monotonic_ns()
        if error is None:
            self.chunks.append((now_ns, int(result.as_numpy(wire.SENT_AT_NS)[0])))


def tensor(name: str, datatype: str, values: np.ndarray) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def play(url: str, streams: int, seconds: float) -> None:
    """Hold the streams for ``seconds`` once all run; print the figures as one JSON object."""
    chunks: list[tuple[int, int]] = []
    frames = round((seconds + SPREAD_S + 5) * wire.FRAMES_PER_SECOND)
    users = [User(url, frames, chunks) for _ in range(streams)]
    for user in users:
        user.speak()
        gevent.sleep(SPREAD_S / streams)
    gevent.sleep(1)
    chunks.clear()
    cpu_s = time.process_time()
    gevent.sleep(seconds)
    seen, cpu_s = np.array(chunks), time.process_time() - cpu_s
    lateness_ms = (seen[:, 0] - seen[:, 1]) / 1e6
    p50, p99 = np.quantile(lateness_ms, [0.5, 0.99])
    figures = {"p50_ms": p50, "p99_ms": p99, "chunks": len(seen), "cpu_s_per_1000": cpu_s / len(seen) * 1000}
    print(json.dumps(figures), flush=True)
    os._exit(0)
