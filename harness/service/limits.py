"""What every request has to pass before it is looked at: names of hosts, origins, sizes and times; and safe headers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from harness.service.settings import StudioSettings

SEND_S = 60.0  # a listener that takes nothing for so long is let go
_MORE = 1 << 16  # of a body, beside the script or the voice in it
_JSON_BYTES = 6  # that one byte of text may take in JSON
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
SAFE_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
        b"connect-src 'self'; font-src 'self'; worker-src 'self'; manifest-src 'self'; form-action 'self'; "
        b"base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
OnDone = Callable[[Scope, int, float], None]


class RequestLimits:
    """ASGI middleware. ``on_done`` gets the scope, the status and the seconds of every request."""

    def __init__(self, app: ASGIApp, settings: StudioSettings, on_done: OnDone):
        self.app, self.settings, self.on_done = app, settings, on_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began_s, status = time.monotonic(), 0

        async def timed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *SAFE_HEADERS]
            async with asyncio.timeout(SEND_S):
                await send(message)

        try:
            if refusal := self._refusal(scope):
                return await refusal(scope, receive, timed_send)
            await self.app(scope, self._limited(scope, receive), timed_send)
        finally:
            self.on_done(scope, status, time.monotonic() - began_s)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if not self._is_ours(headers.get("host", "")):
            return _refused(421, "this is not the address of this service: add its name to HARNESS_STUDIO_HOSTS")
        origin = headers.get("origin")
        if origin and scope["method"] not in _SAFE_METHODS and origin.partition("://")[2] != headers.get("host"):
            return _refused(403, "pages of other sites may not use this service")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most(scope):
            return _refused(413, f"the request is larger than {self._most(scope)} bytes")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether the Host header names this service: another name may be a page that was pointed here (rebinding)."""
        names = self.settings.host_names
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return not names or name.lower() in names

    def _most(self, scope: Scope) -> int:
        """The largest body that a path takes."""
        is_voice = scope["path"].startswith("/v1/voices")
        return _MORE + (self.settings.voice_bytes if is_voice else _JSON_BYTES * self.settings.script_bytes)

    def _limited(self, scope: Scope, receive: Receive) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """``receive`` for bodies that end in time and are not too large."""
        most, until_s, size, more = self._most(scope), time.monotonic() + self.settings.body_s, 0, True

        async def limited() -> MutableMapping[str, Any]:
            nonlocal size, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout(until_s - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the request's body did not arrive within {self.settings.body_s:g} s"
                ) from None
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > most:
                raise HTTPException(413, f"the request is larger than {most} bytes")
            return message

        return limited


def _refused(status: int, words: str) -> JSONResponse:
    return JSONResponse({"detail": words}, status, headers={"Connection": "close"})


def timed_protocol(headers_s: float) -> type[H11Protocol]:
    """uvicorn's protocol with a time limit for the headers of a request, which it lacks."""

    class TimedProtocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._is_between() and self._waiting:
                self._waiting.cancel()
                self._waiting = None
            elif self._is_between() and not self._waiting:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._waiting:
                self._waiting.cancel()
            super().connection_lost(exc)

        def _is_between(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _wait(self) -> None:
            self._waiting = self.loop.call_later(headers_s, self._give_up)

        def _give_up(self) -> None:
            self._waiting = None
            if self._is_between():
                self.transport.close()

    return TimedProtocol
