"""Connections to the servers of a target, in a module of its own so that code that only parses options skips gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import grpc.aio

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # a load test through a proxy would measure the proxy
    ("grpc.client_idle_timeout_ms", 2**31 - 1),  # a connection that gRPC closes when idle would look like a loss
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # the default of two minutes is longer than a server's restart
    # A cut network gives no sign. After 10 s without a byte gRPC sends a ping, and closes a connection that does not
    # answer. Servers disconnect a client whose fourth ping arrives during silence; ours is never silent for that long.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without a value gRPC uses a minute, whatever the line above says
)


class Encryption(Protocol):
    """What a connection needs of ``target.Tls``."""

    @property
    def server_name(self) -> str: ...

    def pems(self) -> tuple[bytes | None, bytes | None, bytes | None]: ...


class Service(Protocol):
    """What a connection needs of ``target.Target``."""

    @property
    def tls(self) -> Encryption | None: ...

    @property
    def headers(self) -> Sequence[tuple[str, str]]: ...

    @property
    def ready_s(self) -> float: ...


def blocking(service: Service, address: str) -> grpc.Channel:
    """A connection for blocking calls; it adds the headers to each."""
    channel = _open(grpc, service, address)
    return grpc.intercept_channel(channel, _WithHeaders(service.headers)) if service.headers else channel


def aio(service: Service, address: str) -> grpc.aio.Channel:
    """A connection for asyncio; every call must pass the headers as its ``metadata``."""
    return _open(grpc.aio, service, address)


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """The status of a failed call, and the server's own message ("" where it gave none)."""
    if isinstance(error, (grpc.Call, grpc.aio.AioRpcError)):
        return error.code(), error.details() or ""
    return grpc.StatusCode.UNKNOWN, str(error)


def _open(api, service: Service, address: str):
    # gRPC's name for the time limit of one attempt to connect, TLS included: a short one cannot reach a distant server.
    options = [*CHANNEL_OPTIONS, ("grpc.min_reconnect_backoff_ms", round(service.ready_s * 1e3))]
    tls = service.tls
    if tls is None:
        return api.insecure_channel(address, options=options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return api.secure_channel(address, grpc.ssl_channel_credentials(*tls.pems()), options=options)


class _WithHeaders(grpc.UnaryUnaryClientInterceptor):
    def __init__(self, headers: Sequence[tuple[str, str]]):
        self._headers = headers

    def intercept_unary_unary(self, continuation, client_call_details, request):
        return continuation(client_call_details._replace(metadata=self._headers), request)
