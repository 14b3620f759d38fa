"""The open connections to a target: which one gets the next stream, and how often each was lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc.aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from harness import wire
from harness.client.channels import status_of
from harness.client.target import CA, CERT, DEFAULT_PORT, KEY, LEAST_LOADED, Target, Tls
from harness.clock import HOST, Clock
from harness.errors import InputError, ServerError

STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
PING_TIMEOUT = "ping timeout"  # gRPC's wording
ASK_AFTER_S = 3.0  # of silence: see ``ask_s``
COUNT_TIMEOUT_S = 3.0  # the end of a test does not wait for a server that has ended
COUNTS_WITHIN_S = (0.1, 0.4)  # Triton may count a request some time after its last response
# A server may withhold its configuration, and a proxy may not know the call; Triton restricts it in its own words.
WITHHELD = grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED
RESTRICTED = "This protocol is restricted"


@dataclass(frozen=True)
class ConnectionStatistics:
    """Statistics of one process's connections, by server address; sums over several processes cover all of them.

    ``reconnects``: connections lost and re-established. ``passed_over``: requests sent to another server because this
    one was down. ``counted``: requests that the server had counted before the process sent any; ``served``: those that
    it has completed for the process since; ``remembered``: its count at the end. These three omit servers without
    statistics. ``clockless``: how many processes the server did not tell its time dilation.
    """

    reconnects: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    counted: dict[str, int] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    remembered: dict[str, int] = field(default_factory=dict)
    clockless: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: ConnectionStatistics) -> ConnectionStatistics:
        # Counts only grow, so the minimum is that before all requests and the maximum that after them.
        return ConnectionStatistics(
            self.reconnects + other.reconnects,
            self.passed_over + other.passed_over,
            _merged(min, self.counted, other.counted),
            self.served + other.served,
            _merged(max, self.remembered, other.remembered),
            self.clockless + other.clockless,
        )

    @property
    def forgotten(self) -> Counter[str]:
        """How many served requests are missing from each server's own count.

        Above 0 where the server was restarted meanwhile, its entry was reloaded, or several servers answer at its
        address. 0 where other clients sent so many requests that no loss shows.
        """
        known = self.counted.keys() & self.remembered.keys()
        return +Counter({each: self.counted[each] + self.served[each] - self.remembered[each] for each in known})

    def to_plain(self) -> dict[str, dict[str, int]]:
        return {name: dict(counts) for name, counts in vars(self).items()}

    @classmethod
    def from_plain(cls, plain: dict[str, dict[str, int]]) -> ConnectionStatistics:
        return cls(**{name: Counter(counts) for name, counts in plain.items()})


def _merged(choose: Callable[[int, int], int], one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    both = {each: choose(one[each], other[each]) for each in one.keys() & other.keys()}
    return {**one, **other, **both}


class Replica:
    """One server: its connection, and what this process knows of it.

    ``streams`` are open now, ``served`` are complete. ``down``: the connection is lost or refused. ``reconnects``
    counts losses that were repaired, ``passed_over`` the streams sent to another server because this one was down. A
    stream that receives nothing for ``silence_s`` seconds has lost its server; a server may announce a shorter time
    than the target's. After ``ask_s`` seconds of silence it asks whether the process that serves it has ended.
    """

    def __init__(self, target: Target, address: str):
        self.target, self.address = target, address
        self.streams = self.served = self.reconnects = self.passed_over = 0
        self.silence_s = target.silence_s
        self.ask_s = ASK_AFTER_S
        self.clock: Clock | None = None  # of the server, once it is ready
        self.clockless = False  # it does not tell; its clock is then taken to be the host's
        self.counted: int | None = None  # by the server, before our first request
        self.down = self._was_up = False
        self._channel = target.aio_channel(address)
        self.stub = GRPCInferenceServiceStub(self._channel)
        # Only one request message is sent, so a single unary-stream call suffices; three separate steps would each wait
        # for those of other streams. It carries raw bytes, which the stream decodes.
        self.stream_infer = self._channel.unary_stream(STREAM_INFER)
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        await self._channel.close()

    async def ready(self) -> None:
        """Return once the server accepts speech requests. Raises ServerError where it cannot."""
        manner = {"timeout": self.target.ready_s, "metadata": self.target.headers}
        try:
            server = await self.stub.ServerReady(pb.ServerReadyRequest(), **manner)
            model = await self.stub.ModelReady(pb.ModelReadyRequest(name=wire.ENTRY), **manner)
        except grpc.aio.AioRpcError as error:
            raise ServerError(self.described(error)) from error
        if not server.ready:
            raise ServerError(f"Triton at {self.address} is up but not ready: wait until its models are loaded")
        if not model.ready:
            raise ServerError(
                f"Triton at {self.address} does not serve the model {wire.ENTRY!r}: "
                "load the model repository of this project into it"
            )
        self.counted = await self._count()
        self.clock = await self._clock()

    async def remembered(self, alone: bool) -> int | None:
        """The server's count at the end; None where it gives none.

        Waits for the server to count the last requests; where we are its only client (``alone``), only until it has
        counted ours.
        """
        for wait_s in (0.0, *COUNTS_WITHIN_S):
            await asyncio.sleep(wait_s)
            now = await self._count()
            if self.counted is None or now is None or (alone and now >= self.counted + self.served):
                break
        return now

    async def _count(self) -> int | None:
        manner = {"timeout": min(self.target.ready_s, COUNT_TIMEOUT_S), "metadata": self.target.headers}
        try:
            answer = await self.stub.ModelStatistics(pb.ModelStatisticsRequest(name=wire.ENTRY), **manner)
        except grpc.aio.AioRpcError:
            return None
        return sum(int(model.inference_count) for model in answer.model_stats)

    async def _clock(self) -> Clock:
        """The server's clock; the host's where it withholds its configuration. Raises ServerError for other errors."""
        manner = {"timeout": self.target.ready_s, "metadata": self.target.headers}
        try:
            answer = await self.stub.ModelConfig(pb.ModelConfigRequest(name=wire.ENTRY), **manner)
        except grpc.aio.AioRpcError as error:
            code, details = status_of(error)
            self.clockless = code in WITHHELD or RESTRICTED in details
            if self.clockless:
                return HOST
            raise ServerError(f"its time dilation is not known: {self.described(error)}") from error
        self.clockless = False
        return Clock.of(answer.config.parameters[wire.DILATION].string_value)

    def described(self, error: grpc.RpcError) -> str:
        """Turn a gRPC status into a message that says how to fix it, with the server's own message unchanged."""
        return described(error, self.address, self.target.tls)

    async def _watch(self) -> None:
        """Keep the connection up and count losses: a ready state that was left and reached again."""
        while True:
            state = self._channel.get_state(try_to_connect=True)
            is_up = state is grpc.ChannelConnectivity.READY
            if is_up:
                self.reconnects += self._was_up
                self._was_up = True
            self.down = not is_up and (self._was_up or state is grpc.ChannelConnectivity.TRANSIENT_FAILURE)
            await self._channel.wait_for_state_change(state)


class Replicas:
    """All servers of a target as one process sees them. An async context manager.

    Round robin uses them in order. Least-loaded uses the one with the fewest streams *of this process* (streams of
    others are unknown here), the first in order among equals. The order starts at number ``first``, so that the ``of``
    processes that share the servers start at different ones. A server that is down is skipped while another is up; its
    connection is retried, so it is used again once it is up.
    """

    def __init__(self, target: Target, first: int = 0, of: int = 1):
        self.target, self._first, self._of = target, first, of
        self._ring: deque[Replica] = deque()

    async def __aenter__(self) -> Replicas:
        self._ring.extend(Replica(self.target, address) for address in self.target.addresses)
        self._ring.rotate(-self._first)
        return self

    async def __aexit__(self, *_) -> None:
        await asyncio.gather(*(replica.close() for replica in self._ring))

    async def ready(self) -> None:
        """Return once every server accepts speech requests. Raises ServerError for one that cannot."""
        answers = await asyncio.gather(*(replica.ready() for replica in self._ring), return_exceptions=True)
        for error in filter(None, answers):
            raise error

    @property
    def clock(self) -> Clock:
        """The clock of all servers that were ready. Raises InputError where they differ: no load fits two."""
        clocks = {replica.clock for replica in self._ring if replica.clock}
        if len(clocks) > 1:
            raise InputError("the servers run with different time dilation: drive each of them by itself")
        return clocks.pop() if clocks else HOST

    async def any_ready(self) -> None:
        """Return once one of the servers accepts speech requests. Raises ServerError where none can."""
        answers = await asyncio.gather(*(replica.ready() for replica in self._ring), return_exceptions=True)
        if errors := [error for error in answers if error]:
            if len(errors) == len(self._ring):
                raise errors[0]

    def choose(self) -> Replica:
        """The server for the next stream."""
        up = [replica for replica in self._ring if not replica.down] or list(self._ring)
        if self.target.balance == LEAST_LOADED:
            wanted, chosen = (min(some, key=lambda replica: replica.streams) for some in (self._ring, up))
            wanted.passed_over += wanted is not chosen
            return chosen
        while self._ring[0] not in up:
            self._ring[0].passed_over += 1
            self._ring.rotate(-1)
        self._ring.rotate(-1)
        return self._ring[-1]

    @property
    def reconnects(self) -> Counter[str]:
        """Connections lost and re-established, by address."""
        return Counter({replica.address: replica.reconnects for replica in self._ring})

    @property
    def passed_over(self) -> Counter[str]:
        """Streams sent elsewhere because the server was down, by address."""
        return Counter({replica.address: replica.passed_over for replica in self._ring})

    async def connection_statistics(self) -> ConnectionStatistics:
        """Statistics at the end of a test, after asking every server for its count."""
        last = await asyncio.gather(*(replica.remembered(alone=self._of == 1) for replica in self._ring))
        counted: dict[str, int] = {}
        served: Counter[str] = Counter()
        remembered: dict[str, int] = {}
        for each, now in zip(self._ring, last, strict=True):
            if each.counted is not None and now is not None:
                counted[each.address], served[each.address], remembered[each.address] = each.counted, each.served, now
        clockless = Counter(replica.address for replica in self._ring if replica.clockless)
        return ConnectionStatistics(self.reconnects, self.passed_over, counted, served, remembered, clockless)


def described(error: grpc.RpcError, address: str, tls: Tls | None) -> str:
    """Turn a gRPC status into a message that says how to fix it, with the server's own message unchanged."""
    code, details = status_of(error)
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(details, address, tls)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{address} did not answer in time: is it Triton's gRPC port, and does a firewall block it?"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"{address} speaks gRPC but not Triton's protocol: give the gRPC address of a Triton server"
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        said = details or "no message"
        return (
            f"{address} rejected the credentials ({code.name}: {said}): give the header that it requires with --header"
        )
    return f"{details or 'no message'} ({code.name} from {address})"


def _unavailable(details: str, address: str, tls: Tls | None) -> str:
    if PING_TIMEOUT in details:
        return f"{address} sent nothing, not even an answer to a ping, for 10 s: check the network connection"
    if "http1" in details.lower():
        return f"{address} is an HTTP port: give Triton's gRPC port (usually {DEFAULT_PORT}, not 8000)"
    if tls is not None and (words := _tls_refused(details, tls)):
        return f"{address} {words}"
    if tls is None and "failed to connect" in details and "Socket closed" in details:
        return (
            f"no Triton answers at {address}, where every connection is closed at once: is it up, and is that its gRPC "
            "port? For a server with TLS write grpcs://"
        )
    return (
        f"no Triton answers at {address}: start one with `harness serve`, "
        f"or give its gRPC address ({details.splitlines()[0] if details else 'no detail'})"
    )


def _tls_refused(details: str, tls: Tls) -> str:
    """Why a TLS connection failed, from BoringSSL's wording; "" where TLS is not the cause."""
    if "Hostname Verification" in details or "not in peer certificate" in details:  # newer and older gRPC
        named = f"not to {tls.server_name} (--tls-server-name)" if tls.server_name else "not to the host of the URL"
        return f"has a certificate for another name, {named}: give the name with --tls-server-name"
    if "certificate has expired" in details:
        return "has a certificate that has expired: renew it on the server"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        ours = f"{CA} {tls.ca}" if tls.ca else "public CAs"
        why = details.partition("CERTIFICATE_VERIFY_FAILED: ")[2].removesuffix(": OK")
        return f"has a certificate that is not signed by a trusted CA ({ours}: {why}): give its CA with {CA}"
    if "WRONG_VERSION_NUMBER" in details:
        return "does not speak TLS: write grpc:// and leave the --tls options out, or give its port with TLS"
    if "failed to connect" in details and any(word in details for word in ("Socket closed", "reset", "Broken pipe")):
        asks = f"does not trust {CERT} {tls.cert}" if tls.cert else f"asks for a client's {CERT} and {KEY}"
        return f"closes every connection at once: perhaps it {asks}"
    return f"cannot be reached by TLS: {details.splitlines()[0]}" if "handshake failed" in details else ""
