"""One request for speech in, one Result out, over Triton's gRPC stream: the only file that opens a stream."""

from __future__ import annotations

import asyncio
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from harness import wire
from harness.errors import HarnessError, InputError, RequestError, ServerError
from harness.records import Chunks, Outcome, Request, Result

DEFAULT_PORT = 8001
READY_TIMEOUT_S = 10.0
SILENCE_LIMIT_S = 60.0  # a server that lives sends something every few seconds, even while a request waits
BYTES_PER_SAMPLE = 4
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # a load test through a proxy would measure the proxy
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # the default of two minutes outlasts a server's restart
    # A network that is cut says nothing. After 10 s without a byte a ping asks, and a connection without an answer is
    # given up. A server hangs up on a client whose fourth ping comes while it is silent; ours is never silent so long.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # a minute unless given, whatever the line above says
)
CONNECTION_LOST, PING_TIMEOUT = "Stream removed", "ping timeout"  # gRPC's words
FORMATS = {"INT32": "i", "INT64": "q", "FP32": "f", "BOOL": "?"}  # of struct, for Triton's types
FINAL = "triton_final_response"
ASK_FOR_FINAL = "triton_enable_empty_final_response"

OnAudio = Callable[[bytes], None]
OnCarry = Callable[[bytes], None]
OnChunk = Callable[["Stream", int, int], None]  # the stream, time of arrival (ns), samples


def address_of(url: str) -> tuple[str, bool]:
    """``host:port`` and whether to use TLS, from ``grpc://host:port``, ``grpcs://…``, ``host:port`` or ``host``.

    Raises InputError for a URL of another kind.
    """
    scheme, separator, rest = url.strip().rpartition("://")
    rest = rest.rstrip("/")
    if separator and scheme not in ("grpc", "grpcs"):
        raise InputError(
            f"cannot stream from {url!r}: speech comes over Triton's gRPC port; "
            f"give it as grpc://host:{DEFAULT_PORT} (or grpcs:// for TLS)"
        )
    if not rest or any(letter in rest for letter in "/?# \t"):
        raise InputError(f"{url!r} is not the address of a server: write grpc://host:port or host:port")
    host, colon, port = rest.rpartition(":")
    has_port = bool(colon) and not rest.endswith("]")
    if has_port and not (host and port.isdigit() and 0 < int(port) < 65_536):
        raise InputError(f"{url!r} has no usable port: write grpc://host:port with a port from 1 to 65535")
    return (rest if has_port else f"{rest}:{DEFAULT_PORT}"), scheme == "grpcs"


def _tensor(message: pb.ModelInferRequest, name: str, datatype: str, shape: list[int], content: bytes) -> None:
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(content)


def _packed(name: str, datatype: str, values: Sequence[float]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}{FORMATS[datatype]}", *values)
    except (struct.error, OverflowError):
        raise RequestError(f"{name} {', '.join(map(str, values))} does not fit Triton's {datatype}") from None


def infer_message(request: Request) -> pb.ModelInferRequest:
    """The request as Triton's protocol has it: inputs of the entry model as raw bytes, little-endian.

    What most requests do not use is left out at its default: messages stay small, and an older deployment takes them.
    ``frames`` 0 with ``until_end`` is left out too: as long as the model speaks. Raises RequestError for a number that
    its type cannot hold; limits of the model are the server's to judge.
    """
    message = pb.ModelInferRequest(model_name=wire.ENTRY, id=request.request_id)
    message.parameters[ASK_FOR_FINAL].bool_param = True
    text = request.script.encode("utf-8")
    _tensor(message, wire.TEXT_INPUT, "BYTES", [1], struct.pack("<I", len(text)) + text)
    for name, datatype, values in _numbers(request):
        _tensor(message, name, datatype, [len(values)], _packed(name, datatype, values))
    if request.carry:
        _tensor(message, wire.CARRY, "UINT8", [len(request.carry)], request.carry)
    return message


def _numbers(request: Request) -> Iterator[tuple[str, str, Sequence[float]]]:
    """Name, Triton type and values of the inputs that a request needs."""
    yield wire.SPEAKER_IDS, "INT32", request.speaker_ids
    if request.frames or not request.until_end:
        yield wire.FRAMES, "INT32", [request.frames]
    yield wire.START_FRAME, "INT32", [request.start_frame]
    yield wire.CHUNK_FRAMES, "INT32", [request.chunk_frames]
    yield wire.SEED, "INT64", [request.seed]
    yield wire.GUIDANCE_SCALE, "FP32", [request.guidance_scale]
    if request.diffusion_steps != wire.DEFAULT_DIFFUSION_STEPS:
        yield wire.DIFFUSION_STEPS, "INT32", [request.diffusion_steps]
    if request.until_end:
        yield wire.UNTIL_END, "BOOL", [True]
    if request.say:
        yield wire.SAY, "INT32", request.say
    if request.keep:
        yield wire.KEEP, "BOOL", [True]


def make_result(
    request: Request,
    loop: str,
    outcome: Outcome,
    error: str = "",
    *,
    sent_ns: int = 0,
    ended_ns: int | None = None,
    chunks: Chunks | None = None,
    emulated: bool = False,
) -> Result:
    """What became of a request; ``sent_ns`` = 0 says that it was never sent."""
    return Result(
        request_id=request.request_id,
        traffic_class=request.traffic_class,
        speakers=len(request.speaker_ids),
        script_words=len(request.script.split()),
        frames=request.frames,
        start_frame=request.start_frame,
        chunk_frames=request.chunk_frames,
        loop=loop,
        due_ns=request.due_ns,
        sent_ns=sent_ns,
        ended_ns=time.monotonic_ns() if ended_ns is None else ended_ns,
        outcome=outcome,
        error=error,
        chunks=Chunks.empty() if chunks is None else chunks,
        emulated=emulated,
    )


def failed_result(request: Request, loop: str, error: Exception) -> Result:
    """The Result of a request that an exception ended."""
    words = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
    return make_result(request, loop, Outcome.ERROR, words)


class Stream:
    """One request on its way: ``await run()`` gives its Result; ``stop(outcome)`` ends it early with what has come."""

    def __init__(
        self,
        stub: GRPCInferenceServiceStub,
        address: str,
        request: Request,
        loop: str,
        on_audio: OnAudio | None = None,
        on_chunk: OnChunk | None = None,
        on_carry: OnCarry | None = None,
    ):
        self.request = request
        self._stub, self._address, self._loop = stub, address, loop
        self._message = infer_message(request)  # built ahead of the due time
        self._on_audio, self._on_chunk, self._on_carry = on_audio, on_chunk, on_carry
        self._call = None
        self._task: asyncio.Task | None = None
        self._stopped: Outcome | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._sent_ns = 0
        self._heard_ns = 0
        self._final_ns = 0
        self._error = ""
        self._emulated = self._kept = False
        self._received, self._sent_at, self._samples = array("q"), array("q"), array("q")

    def stop(self, outcome: Outcome) -> None:
        """End the request now; ``run()`` returns a Result of this outcome with the chunks so far."""
        self._stopped = outcome
        if self._task is not None:
            self._task.cancel()  # not the call: one that is cancelled before its headers left waits for ever

    async def run(self) -> Result:
        """Send the request now and read to the end of its stream; raises nothing that the server does."""
        if self._stopped is not None:
            return self._result()
        self._task = asyncio.current_task()
        try:
            await self._exchange()
        except grpc.aio.AioRpcError as error:
            self._fail(self._in_words(error))
        except asyncio.InvalidStateError:
            self._fail(f"the server at {self._address} ended the call before it took the request")
        except asyncio.CancelledError:
            self._call.cancel()
            if self._stopped is not None or self._error:
                self._task.uncancel()
            elif not self._final_ns:  # the caller was cancelled
                raise
        finally:
            self._silence.cancel()
            self._task = None
        return self._result()

    def _fail(self, error: str) -> None:
        if self._stopped is None and not self._final_ns:
            self._error = error

    def _listen(self) -> None:
        """End a stream that has been silent for too long; otherwise look again when it could have been."""
        if self._final_ns:
            return
        left_s = SILENCE_LIMIT_S - (time.monotonic_ns() - self._heard_ns) / 1e9
        if left_s > 0:
            self._silence = asyncio.get_running_loop().call_later(left_s, self._listen)
            return
        self._fail(
            f"the server at {self._address} has sent nothing for {SILENCE_LIMIT_S:g} s: the process that served this "
            f"request has ended, or the way to it is cut; {self._progress()}; ask again"
        )
        self._task.cancel()

    async def _exchange(self) -> None:
        self._sent_ns = self._heard_ns = time.monotonic_ns()
        self._listen()
        self._call = self._stub.ModelStreamInfer()
        await self._call.write(self._message)
        self._message = None
        await self._call.done_writing()
        while True:
            response = await self._call.read()
            now_ns = time.monotonic_ns()
            if response is grpc.aio.EOF:
                return
            self._heard_ns = now_ns
            self._take(response, now_ns)

    def _take(self, response: pb.ModelStreamInferResponse, now_ns: int) -> None:
        if response.error_message:
            self._error, self._final_ns = _without_its_process(response.error_message), now_ns
            self._call.cancel()
            return
        infer = response.infer_response
        raw = {output.name: content for output, content in zip(infer.outputs, infer.raw_output_contents, strict=True)}
        self._take_audio(raw, now_ns)
        if carry := raw.get(wire.CARRY):
            self._kept = True
            if self._on_carry is not None:
                self._on_carry(carry)
        if infer.parameters[FINAL].bool_param:
            self._final_ns = now_ns

    def _take_audio(self, raw: dict[str, bytes], now_ns: int) -> None:
        self._emulated = self._emulated or any(raw.get(wire.EMULATED, b""))
        audio = raw.get(wire.AUDIO_OUTPUT)
        if not audio:
            return
        sent_at = raw.get(wire.SENT_AT_NS)
        samples = len(audio) // BYTES_PER_SAMPLE
        self._received.append(now_ns)
        self._sent_at.append(struct.unpack("<q", sent_at)[0] if sent_at else 0)
        self._samples.append(samples)
        if self._on_chunk is not None:
            self._on_chunk(self, now_ns, samples)
        if self._on_audio is not None:
            self._on_audio(audio)

    def _result(self) -> Result:
        outcome, error = self._ending()
        columns = self._received, self._sent_at, self._samples
        return make_result(
            self.request,
            self._loop,
            outcome,
            error,
            sent_ns=self._sent_ns,
            ended_ns=self._final_ns or None,
            chunks=Chunks(*(np.array(column, np.int64) for column in columns)),
            emulated=self._emulated,
        )

    def _ending(self) -> tuple[Outcome, str]:
        if self._error:
            return Outcome.ERROR, self._error
        if self._final_ns and not self._is_whole():
            return Outcome.ERROR, f"the stream ended {self._progress()}"
        if self._final_ns and self.request.keep and not self._kept:
            return Outcome.ERROR, f"the stream ended without the {wire.CARRY} that was asked for"
        if self._final_ns:
            return Outcome.DONE, ""
        if self._stopped is not None:
            return self._stopped, ""
        return Outcome.ERROR, f"the stream broke off without a final response, {self._progress()}"

    def _is_whole(self) -> bool:
        """Whether all audio came: all that was asked for, or whole frames of it where the model chose the end."""
        samples, most = sum(self._samples), self.request.frames * wire.SAMPLES_PER_FRAME
        if not self.request.until_end:
            return samples == most
        return samples % wire.SAMPLES_PER_FRAME == 0 and (samples <= most or not self.request.frames)

    def _progress(self) -> str:
        samples, asked = sum(self._samples), self.request.frames * wire.SAMPLES_PER_FRAME
        return f"with {samples} samples of audio" + (f" where {asked} were asked for" if asked else "")

    def _in_words(self, error: grpc.aio.AioRpcError) -> str:
        details = error.details() or ""
        was_there = self._received or CONNECTION_LOST in details
        if error.code() is grpc.StatusCode.UNAVAILABLE and was_there and PING_TIMEOUT not in details:
            return f"the server at {self._address} went away, {self._progress()}: {details}"
        return _in_words(error, self._address)


def _without_its_process(message: str) -> str:
    """The server's message as it is, but for the one that Triton gives while the entry's own process is gone."""
    if f"Stub process '{wire.ENTRY}" in message:
        return f"{wire.ENTRY} ended, and is being started again; ask again"
    return message


def _in_words(error: grpc.aio.AioRpcError, address: str) -> str:
    """A gRPC status as a sentence that says how to mend it; the server's own message is kept as it is."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and PING_TIMEOUT in details:
        return f"{address} fell silent and did not answer a ping for 10 s: is the network to it cut?"
    if code is grpc.StatusCode.UNAVAILABLE and "http1" in details.lower():
        return f"{address} is an HTTP port: give Triton's gRPC port (usually {DEFAULT_PORT}, not 8000)"
    if code is grpc.StatusCode.UNAVAILABLE:
        return (
            f"no Triton answers at {address}: start one with `harness serve`, "
            f"or give its gRPC address ({details.splitlines()[0] if details else 'no detail'})"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{address} did not answer in time: is it Triton's gRPC port, and is the way to it open?"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"{address} speaks gRPC but not Triton's protocol: give the gRPC address of a Triton server"
    return f"{details or 'no message'} ({code.name} from {address})"


class SpeechClient:
    """A connection to one Triton server, shared by all streams that it opens. An async context manager."""

    def __init__(self, url: str):
        self.address, self._secure = address_of(url)
        self._channel: grpc.aio.Channel | None = None
        self._stub: GRPCInferenceServiceStub | None = None

    async def __aenter__(self) -> SpeechClient:
        if self._secure:
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.aio.secure_channel(self.address, credentials, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self._stub = GRPCInferenceServiceStub(self._channel)
        return self

    async def __aexit__(self, *_) -> None:
        await self._channel.close()

    async def ready(self) -> None:
        """Return when the server can take speech requests; raise ServerError, in words, when it cannot."""
        try:
            server = await self._stub.ServerReady(pb.ServerReadyRequest(), timeout=READY_TIMEOUT_S)
            model = await self._stub.ModelReady(pb.ModelReadyRequest(name=wire.ENTRY), timeout=READY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise ServerError(_in_words(error, self.address)) from error
        if not server.ready:
            raise ServerError(f"Triton at {self.address} is up but not ready: wait for its models to load")
        if not model.ready:
            raise ServerError(
                f"Triton at {self.address} does not serve the model {wire.ENTRY!r}: "
                "load the model repository of this project into it"
            )

    def open(
        self,
        request: Request,
        loop: str,
        *,
        on_audio: OnAudio | None = None,
        on_chunk: OnChunk | None = None,
        on_carry: OnCarry | None = None,
    ) -> Stream:
        """Make the stream of one request ready; nothing is sent before its ``run()``. Raises RequestError."""
        return Stream(self._stub, self.address, request, loop, on_audio, on_chunk, on_carry)

    async def speak(
        self, request: Request, loop: str, *, on_audio: OnAudio | None = None, on_carry: OnCarry | None = None
    ) -> Result:
        """Send the request now and read its audio to the end. Never raises for what the server does: see Result.

        A request with ``keep`` gets its carry by ``on_carry``, after the last audio. Raises RequestError, before
        anything is sent, for a number that Triton's types cannot hold.
        """
        return await self.open(request, loop, on_audio=on_audio, on_carry=on_carry).run()
