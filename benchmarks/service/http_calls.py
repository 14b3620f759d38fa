"""A small HTTP client on asyncio for many callers in one process: JSON requests, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

JSON = "application/json"


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """A caller with one connection, which is kept between requests. An async context manager."""

    def __init__(self, port: int):
        self._port = port
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Caller:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_) -> None:
        if self._writer:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def call(self, method: str, path: str, body: Any = None) -> Answer:
        return await self.send(method, path, b"" if body is None else json.dumps(body).encode(), JSON)

    async def send(self, method: str, path: str, content: bytes, kind: str) -> Answer:
        await self._ask(method, path, content, kind)
        status, headers = await self._head()
        if "content-length" not in headers:
            raise ValueError(f"{method} {path}: an answer without a length")
        return Answer(status, await self._reader.readexactly(int(headers["content-length"])))

    async def events(self, path: str) -> AsyncIterator[Any]:
        """The ``data:`` of each event; the connection is used up. Raises ValueError for another status than 200."""
        await self._ask("GET", path)
        status, _ = await self._head()
        if status != 200:
            raise ValueError(f"GET {path}: status {status}")
        while line := await self._reader.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    async def _ask(self, method: str, path: str, content: bytes = b"", kind: str = JSON) -> None:
        assert self._writer is not None
        about = f"Content-Type: {kind}\r\n" if content else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{about}Content-Length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        await self._writer.drain()

    async def _head(self) -> tuple[int, dict[str, str]]:
        text = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
        pairs = (line.partition(": ") for line in text[1:] if line)
        return int(text[0].split()[1]), {name.lower(): value for name, _, value in pairs}
