"""Sends one request for speech over Triton's gRPC stream and returns one Result; no other module opens a stream."""

from __future__ import annotations

import asyncio
import re
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence

import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from harness import wire
from harness.client.probe import STUB_GONE, entry_ended
from harness.client.replicas import PING_TIMEOUT, Replica, Replicas
from harness.client.response_parser import BYTES_PER_SAMPLE, ChunkForm, form_of, is_final, outputs_of
from harness.client.target import Target
from harness.clock import HOST, Clock
from harness.errors import HarnessError, RequestError
from harness.records.schema import Chunks, Outcome, Request, Result

CONNECTION_LOST = "Stream removed"  # gRPC's wording
FORMATS = {"INT32": "i", "INT64": "q", "FP32": "f", "BOOL": "?"}  # struct formats of Triton's types
CLOSES_S = 1.0  # from an error to the end of its stream; then the client leaves
LEAST_ASK_S, ASK_BEATS = 1.0, 1.5  # after this silence a server that missed a heartbeat is asked
BEATS_MISSED = 5  # a server that announces a heartbeat interval and misses this many has ended
_MARKER = re.compile(r"^Speaker \d+:", re.MULTILINE)  # as script.format_script writes it
ASK_FOR_FINAL = "triton_enable_empty_final_response"

OnAudio = Callable[[bytes], None]
OnCarry = Callable[[bytes], None]
OnChunk = Callable[["Stream", int, int], None]  # the stream, time of arrival (ns), samples


def _tensor(message: pb.ModelInferRequest, name: str, datatype: str, shape: list[int], content: bytes) -> None:
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(content)


def _packed(name: str, datatype: str, values: Sequence[float]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}{FORMATS[datatype]}", *values)
    except (struct.error, OverflowError):
        raise RequestError(f"{name} {', '.join(map(str, values))} does not fit Triton's {datatype}") from None


def infer_message(request: Request) -> pb.ModelInferRequest:
    """The request in Triton's protocol: inputs of the entry model as raw bytes, little-endian.

    Optional inputs at their defaults are left out: messages stay small, and older deployments accept them. ``frames`` 0
    with ``until_end`` is left out too: the model then decides the length. Raises RequestError for a number that its
    type cannot hold; the server checks the limits of the model.
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
    target: str = "",
    clock: Clock = HOST,
) -> Result:
    """Build the Result of a request. ``sent_ns`` = 0: it was never sent. ``target``: the server that it was sent to.

    Times are those of the host; the Result has them on the server's ``clock``, as ``due_ns`` of the request is.
    """
    ended_ns = time.monotonic_ns() if ended_ns is None else ended_ns
    return Result(
        request_id=request.request_id,
        traffic_class=request.traffic_class,
        speakers=len(request.speaker_ids),
        script_words=_words(request.script),
        frames=request.frames,
        start_frame=request.start_frame,
        chunk_frames=request.chunk_frames,
        loop=loop,
        due_ns=request.due_ns,
        sent_ns=clock.of_host(sent_ns),
        ended_ns=clock.of_host(ended_ns),
        outcome=outcome,
        error=error,
        chunks=Chunks.empty() if chunks is None else _on_clock(chunks, clock),
        emulated=emulated,
        target=target,
    )


def _on_clock(chunks: Chunks, clock: Clock) -> Chunks:
    """Chunks with the host's times on a server's clock."""
    if clock == HOST:
        return chunks
    times = chunks.received_ns, chunks.sent_at_ns
    received, sent_at = (np.rint(each / clock.dilation).astype(np.int64) for each in times)
    return Chunks(received, sent_at, chunks.samples)


def _words(script: str) -> int:
    """Words of a script without its speaker markers. It must be fast: it runs between the chunks of other streams."""
    return len(script.split()) - 2 * len(_MARKER.findall(script))


def failed_result(request: Request, loop: str, error: Exception, clock: Clock = HOST) -> Result:
    """The Result of a request that an exception ended."""
    words = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
    return make_result(request, loop, Outcome.ERROR, words, clock=clock)


class Stream:
    """One request in progress: ``await run()`` gives its Result; ``stop(outcome)`` ends it early."""

    def __init__(
        self,
        replicas: Replicas,
        request: Request,
        loop: str,
        on_audio: OnAudio | None = None,
        on_chunk: OnChunk | None = None,
        on_carry: OnCarry | None = None,
    ):
        self.request = request
        self._replicas, self._loop = replicas, loop
        self._address = ""  # of the server, chosen when the request is sent
        self._message = infer_message(request).SerializeToString()  # built before the due time
        self._on_audio, self._on_chunk, self._on_carry = on_audio, on_chunk, on_carry
        self._call: grpc.aio.UnaryStreamCall | None = None
        self._task: asyncio.Task | None = None
        self._stopped: Outcome | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task | None = None
        self._sent_ns = 0
        self._heard_ns = 0
        self._final_ns = 0
        self._error = ""
        self._cancelled = False  # by this class, not by the caller
        self._emulated = self._kept = False
        self._carried: list[bytes] = []
        self._form: ChunkForm | None = None  # of the previous chunk
        self._received, self._sent_at, self._samples = array("q"), array("q"), array("q")

    def stop(self, outcome: Outcome) -> None:
        """End the request now; ``run()`` returns a Result with this outcome and the chunks so far."""
        self._stopped = outcome
        self._cancel()

    def _cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()  # not the call: one cancelled before its headers were sent never returns

    async def run(self) -> Result:
        """Send the request now and read its stream to the end. A failure of the server becomes a Result."""
        if self._stopped is not None:
            return self._result()
        task = self._task = asyncio.current_task()
        replica = self._replicas.choose()
        self._address = replica.address
        replica.streams += 1
        try:
            await self._exchange(replica)
        except grpc.aio.AioRpcError as error:
            self._fail(self._described(replica, error))
        except asyncio.CancelledError:
            self._hang_up()
            if task is not None and self._cancelled:
                task.uncancel()
            elif self._error or not self._final_ns:  # the caller was cancelled
                raise
        finally:
            self._stop_timer()
            if self._asking is not None:
                self._asking.cancel()
            replica.streams -= 1
            replica.served += bool(self._final_ns and not self._error)
            self._task = None
        return self._result()

    def _fail(self, error: str) -> None:
        if self._stopped is None and not self._final_ns:
            self._error = error

    def _leave(self) -> None:
        self._cancelled = True
        self._hang_up()

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def _stop_timer(self) -> None:
        if self._silence is not None:
            self._silence.cancel()

    def _listen(self, replica: Replica) -> None:
        """End the stream after too long a silence; otherwise check again when that limit could be reached."""
        if self._final_ns:
            return
        limit_s, silent_s = replica.silence_s, self._silent_s()
        if silent_s < limit_s:
            left_s = limit_s - silent_s
            if silent_s < replica.ask_s:
                left_s = min(left_s, replica.ask_s - silent_s)
            elif self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(replica))
            self._silence = asyncio.get_running_loop().call_later(left_s, self._listen, replica)
            return
        self._fail(
            f"the server at {replica.address} has sent nothing for {limit_s:g} s: the process that served this "
            f"request has ended, or the network failed; {self._progress()}; retry"
        )
        self._cancel()

    def _silent_s(self) -> float:
        return (time.monotonic_ns() - self._heard_ns) / 1e9

    async def _ask(self, replica: Replica) -> None:
        """Ask, while the stream is silent, whether the process that serves it has ended; if so, end the stream."""
        while self._silent_s() >= replica.ask_s:
            heard_ns = self._heard_ns
            if await entry_ended(replica, self._sent_ns) and self._heard_ns == heard_ns and not self._final_ns:
                self._fail(
                    f"{wire.ENTRY} ended while it served this request, and is restarting; {self._progress()}; retry"
                )
                self._cancel()
                return
            await asyncio.sleep(replica.ask_s)

    def _expect(self, replica: Replica, beat_s: float) -> None:
        """Take over the heartbeat interval that the server announced, here and for later streams."""
        replica.silence_s = min(replica.silence_s, BEATS_MISSED * beat_s)
        replica.ask_s = max(LEAST_ASK_S, ASK_BEATS * beat_s)
        self._stop_timer()
        self._listen(replica)

    async def _exchange(self, replica: Replica) -> None:
        self._sent_ns = self._heard_ns = time.monotonic_ns()
        self._listen(replica)
        target = self._replicas.target
        limit_s = None if target.request_s is None else self._replicas.clock.host_span(target.request_s)
        call = self._call = replica.stream_infer(self._message, timeout=limit_s, metadata=target.headers)
        self._message = b""
        while True:
            message = await call.read()
            now_ns = time.monotonic_ns()
            if message is grpc.aio.EOF:
                return
            self._heard_ns = now_ns
            if self._error:  # nothing that counts follows it
                continue
            form = self._form
            if form is not None and form.fits(message):
                self._keep_chunk(now_ns, form.sent_at_ns(message), form.samples)
                if self._on_audio is not None:
                    self._on_audio(form.audio(message))
            else:
                self._take(replica, message, now_ns)

    def _take(self, replica: Replica, message: bytes, now_ns: int) -> None:
        response = pb.ModelStreamInferResponse.FromString(message)
        if response.error_message:
            self._error, self._final_ns = _without_its_process(response.error_message), now_ns
            # Triton (2.51) never frees a stream whose client leaves between the answer and the end: 6 KB each.
            self._stop_timer()
            self._silence = asyncio.get_running_loop().call_later(CLOSES_S, self._leave)
            return
        infer = response.infer_response
        raw = outputs_of(infer)
        self._take_audio(raw, now_ns)
        self._emulated = self._emulated or any(raw.get(wire.EMULATED, b""))
        if beat := raw.get(wire.BEAT_S):
            self._expect(replica, *struct.unpack("<f", beat))
        if carry := raw.get(wire.CARRY):
            self._carried.append(carry)
        if is_final(infer):
            self._final_ns = now_ns
            self._end_carry()
        self._form = form_of(message, infer)

    def _end_carry(self) -> None:
        """Hand over the whole carry; its pieces are freed, as a stream may be kept longer than what it brought."""
        self._kept = bool(self._carried)
        whole, self._carried = b"".join(self._carried), []
        if whole and self._on_carry is not None:
            self._on_carry(whole)

    def _take_audio(self, raw: dict[str, bytes], now_ns: int) -> None:
        audio = raw.get(wire.AUDIO_OUTPUT)
        if not audio:
            return
        sent_at = raw.get(wire.SENT_AT_NS)
        sent_at_ns = struct.unpack("<q", sent_at)[0] if sent_at else 0
        self._keep_chunk(now_ns, sent_at_ns, len(audio) // BYTES_PER_SAMPLE)
        if self._on_audio is not None:
            self._on_audio(audio)

    def _keep_chunk(self, now_ns: int, sent_at_ns: int, samples: int) -> None:
        self._received.append(now_ns)
        self._sent_at.append(sent_at_ns)
        self._samples.append(samples)
        if self._on_chunk is not None:
            self._on_chunk(self, now_ns, samples)

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
            target=self._address,
            clock=self._replicas.clock,
        )

    def _ending(self) -> tuple[Outcome, str]:
        if self._error:
            return Outcome.ERROR, self._error
        if self._final_ns and not self._is_whole():
            return Outcome.ERROR, f"the stream ended {self._progress()}"
        if self._final_ns and self.request.keep and not self._kept:
            return Outcome.ERROR, f"the stream ended without the requested {wire.CARRY}"
        if self._final_ns:
            return Outcome.DONE, ""
        if self._stopped is not None:
            return self._stopped, ""
        return Outcome.ERROR, f"the stream ended without a final response, {self._progress()}"

    def _is_whole(self) -> bool:
        """Whether all audio arrived: as much as was requested, or whole frames where the model chose the end."""
        samples, most = sum(self._samples), self.request.frames * wire.SAMPLES_PER_FRAME
        if not self.request.until_end:
            return samples == most
        return samples % wire.SAMPLES_PER_FRAME == 0 and (samples <= most or not self.request.frames)

    def _progress(self) -> str:
        samples, asked = sum(self._samples), self.request.frames * wire.SAMPLES_PER_FRAME
        return f"with {samples} samples of audio" + (f" where {asked} were requested" if asked else "")

    def _described(self, replica: Replica, error: grpc.aio.AioRpcError) -> str:
        code, details = error.code(), error.details() or ""
        limit_s = self._replicas.target.request_s
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and limit_s is not None:
            return f"the request exceeded its time limit of {limit_s:g} s, {self._progress()}"
        was_there = self._received or CONNECTION_LOST in details
        if code is grpc.StatusCode.UNAVAILABLE and was_there and PING_TIMEOUT not in details:
            return f"the server at {replica.address} ended the connection, {self._progress()}: {details}"
        return replica.described(error)


def _without_its_process(message: str) -> str:
    """The server's message, except for Triton's misleading one while the entry's process is gone."""
    if STUB_GONE in message:
        return f"{wire.ENTRY} ended, and is restarting; retry"
    return message


class SpeechClient:
    """The connections to a service (a URL or a Target), shared by all streams. An async context manager.

    ``first``: index of the first replica to use; ``of``: how many processes share the replicas (see ``Replicas``).
    """

    def __init__(self, target: Target | str, first: int = 0, of: int = 1):
        self.target = Target.of(target)
        self.replicas = Replicas(self.target, first, of)

    async def __aenter__(self) -> SpeechClient:
        await self.replicas.__aenter__()
        return self

    async def __aexit__(self, *_) -> None:
        await self.replicas.__aexit__()

    @property
    def clock(self) -> Clock:
        """The clock of the servers, once they are ready."""
        return self.replicas.clock

    async def any_ready(self) -> None:
        """Return once one of the servers accepts speech requests. Raises ServerError where none can."""
        await self.replicas.any_ready()

    async def ready(self) -> None:
        """Return once every server accepts speech requests. Raises ServerError for one that cannot."""
        await self.replicas.ready()

    def open(
        self,
        request: Request,
        loop: str,
        *,
        on_audio: OnAudio | None = None,
        on_chunk: OnChunk | None = None,
        on_carry: OnCarry | None = None,
    ) -> Stream:
        """Prepare the stream of one request; nothing is sent before its ``run()``. Raises RequestError."""
        return Stream(self.replicas, request, loop, on_audio, on_chunk, on_carry)

    async def speak(
        self, request: Request, loop: str, *, on_audio: OnAudio | None = None, on_carry: OnCarry | None = None
    ) -> Result:
        """Send the request now and read its audio to the end. A failure of the server becomes an error in the Result.

        ``on_carry`` gets the carry of a request with ``keep``, after the last audio. Raises RequestError, before
        anything is sent, for a number that Triton's types cannot hold.
        """
        return await self.open(request, loop, on_audio=on_audio, on_carry=on_carry).run()
