"""CPU cost per message of a process that reads streams, layer by layer, each layer in a separate child process.

socket   HTTP/2 frames from an asyncio socket, parsed by hand: no gRPC at all
core     gRPC's C core with a callback for each message (grpc's own private interface), no asyncio
bytes    grpc.aio, messages left as bytes
message  grpc.aio, messages parsed
stream   the client's Stream: chunks timestamped and kept
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc._cython import cygrpc
from tritonclient.grpc import service_pb2 as pb

from harness import wire
from harness.client.channels import CHANNEL_OPTIONS
from harness.client.stream import SpeechClient, infer_message
from harness.client.target import Target
from harness.drive.readers.pool import POLLING
from harness.drive.readers.process import go_first
from harness.records.schema import Request

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
SPREAD_S = 2.0  # over which the streams start
GRPC_LAYERS = ("core", "bytes", "message", "stream")


def cost_us(layer: str, url: str, streams: int, seconds: float, polling: str = POLLING) -> float:
    """CPU time (µs) per message of a child process that reads ``streams`` streams of 7.5 messages/s."""
    code = f"import floor; floor.play({layer!r}, {url!r}, {streams}, {seconds})"
    folders = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])))
    environment = {**os.environ, "PYTHONPATH": folders, "GRPC_EXPERIMENTS": polling}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 60, check=True)
    return json.loads(done.stdout)["cost_us"]


def play(layer: str, url: str, streams: int, seconds: float) -> None:
    """Entry point of the child process."""
    go_first()
    counter = Counter(seconds)
    request = Request("floor", "benchmark", "Speaker 1: Hello.", (0,), round((seconds + 2 * SPREAD_S + 5) * 7.5))
    LAYERS[layer](url, streams, request, counter)


class Counter:
    """Counts messages; after the first ones it measures the CPU time of the rest, prints it and exits."""

    def __init__(self, seconds: float):
        self.messages, self.seconds = 0, seconds
        threading.Timer(SPREAD_S + 1, self.begin).start()

    def begin(self) -> None:
        self.before = self.messages, time.process_time()
        threading.Timer(self.seconds, self.end).start()

    def end(self) -> None:
        messages, cpu_s = self.messages - self.before[0], time.process_time() - self.before[1]
        print(json.dumps({"cost_us": cpu_s / messages * 1e6}), flush=True)
        os._exit(0)


def read_socket(url: str, streams: int, request: Request, counter: Counter) -> None:
    async def read() -> None:
        host, port = url.split(":")
        _, frames = await asyncio.get_running_loop().create_connection(lambda: _Frames(counter), host, int(port))
        await _each(streams, lambda: frames.ask(request))

    asyncio.run(read())


async def _each(streams: int, start: Callable[[], None]) -> None:
    for _ in range(streams):
        start()
        await asyncio.sleep(SPREAD_S / streams)
    await asyncio.Event().wait()


class _Frames(asyncio.Protocol):
    """The minimum of HTTP/2 (RFC 9113) that reads streams of messages."""

    DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
    WINDOW = 1 << 30

    def __init__(self, counter: Counter):
        self.counter, self.stream, self.unacknowledged = counter, 1, 0
        self.buffer, self.messages = bytearray(), {}

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(self.SETTINGS, 0, 0, b"\0\4" + self.WINDOW.to_bytes(4))  # of each stream
        self.send(self.WINDOW_UPDATE, 0, 0, self.WINDOW.to_bytes(4))

    def send(self, kind: int, flags: int, stream: int, content: bytes = b"") -> None:
        self.transport.write(len(content).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + content)

    def ask(self, request: Request) -> None:
        fields = {":method": "POST", ":scheme": "http", ":path": METHOD, ":authority": "x", "te": "trailers"}
        fields["content-type"] = "application/grpc"
        literal = b"".join(b"\0" + _short(name) + _short(value) for name, value in fields.items())
        self.send(self.HEADERS, 4, self.stream, literal)
        message = infer_message(request).SerializeToString()
        self.send(self.DATA, 1, self.stream, b"\0" + len(message).to_bytes(4) + message)
        self.messages[self.stream] = bytearray()
        self.stream += 2

    def data_received(self, data: bytes) -> None:
        buffer, at = self.buffer, 0
        buffer += data
        while at + 9 <= len(buffer):
            end = at + 9 + int.from_bytes(buffer[at : at + 3])
            if end > len(buffer):
                break
            self.take(buffer[at + 3], buffer[at + 4], int.from_bytes(buffer[at + 5 : at + 9]), buffer[at + 9 : end])
            at = end
        del buffer[:at]

    def take(self, kind: int, flags: int, stream: int, content: bytearray) -> None:
        if kind == self.DATA:
            message = self.messages[stream]
            message += content
            while len(message) >= 5 and len(message) >= 5 + int.from_bytes(message[1:5]):
                del message[: 5 + int.from_bytes(message[1:5])]
                self.counter.messages += 1
            self.unacknowledged += len(content)
            if self.unacknowledged > self.WINDOW >> 4:
                self.send(self.WINDOW_UPDATE, 0, 0, self.unacknowledged.to_bytes(4))
                self.unacknowledged = 0
        elif kind in (self.SETTINGS, self.PING) and not flags & 1:
            self.send(kind, 1, 0, bytes(content) if kind == self.PING else b"")


def _short(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def read_core(url: str, streams: int, request: Request, counter: Counter) -> None:
    channel = cygrpc.Channel(url.encode(), CHANNEL_OPTIONS, None)
    for _ in range(streams):
        _core_stream(channel, request, counter)
        if not counter.messages:
            threading.Thread(target=_spin, args=(channel,), daemon=True).start()
        time.sleep(SPREAD_S / streams)
    threading.Event().wait()


def _spin(channel) -> None:
    while True:
        event = channel.next_call_event()
        event.tag(event)


def _core_stream(channel, request: Request, counter: Counter) -> None:
    def take(event) -> None:
        if event.batch_operations[0].message() is not None:
            counter.messages += 1
            call.operate((cygrpc.ReceiveMessageOperation(0),), take)

    def ignore(event) -> None:
        pass

    ask = (
        cygrpc.SendInitialMetadataOperation((), 0),
        cygrpc.SendMessageOperation(infer_message(request).SerializeToString(), 0),
        cygrpc.SendCloseFromClientOperation(0),
    )
    operations = (
        (ask, ignore),
        ((cygrpc.ReceiveInitialMetadataOperation(0),), ignore),
        ((cygrpc.ReceiveMessageOperation(0),), take),
        ((cygrpc.ReceiveStatusOnClientOperation(0),), ignore),
    )
    call = channel.integrated_call(0, METHOD.encode(), None, None, (), None, operations, None)


def read_aio(deserialiser):
    def read(url: str, streams: int, request: Request, counter: Counter) -> None:
        asyncio.run(_read_aio(deserialiser, url, streams, request, counter))

    return read


async def _read_aio(deserialiser, url: str, streams: int, request: Request, counter: Counter) -> None:
    async def stream() -> None:
        call = ask()
        await call.write(infer_message(request))
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            counter.messages += 1

    async with Target.of(url).aio_channel(url) as channel:
        ask = channel.stream_stream(METHOD, pb.ModelInferRequest.SerializeToString, deserialiser)
        tasks = []
        await _each(streams, lambda: tasks.append(asyncio.ensure_future(stream())))


def read_stream(url: str, streams: int, request: Request, counter: Counter) -> None:
    def count(stream, now_ns: int, samples: int) -> None:
        counter.messages += samples // wire.SAMPLES_PER_FRAME

    async def read() -> None:
        async with SpeechClient(url) as client:
            tasks = []
            start = lambda: client.open(request, "open", on_chunk=count).run()  # noqa: E731
            await _each(streams, lambda: tasks.append(asyncio.ensure_future(start())))

    asyncio.run(read())


LAYERS = {
    "socket": read_socket,
    "core": read_core,
    "bytes": read_aio(None),
    "message": read_aio(pb.ModelStreamInferResponse.FromString),
    "stream": read_stream,
}
