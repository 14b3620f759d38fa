"""A TCP proxy that can be cut: bytes stop in both directions, as with a lost cable, and later connections are reset."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import psutil

_PIECE = 1 << 16
Peers = Callable[[int], bool]


class CutWire:
    """A proxy before ``host:port`` on a thread of its own; a context manager. ``address`` is where it listens.

    While cut, what affected connections send is held back, and new ones of the affected are not served. ``mend`` resets
    the connections that were cut.
    """

    def __init__(self, host: str, port: int):
        self._target = host, port
        self._affected: Peers | None = None
        self._writers: dict[int, list[asyncio.StreamWriter]] = {}
        self._cut: set[int] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> CutWire:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    @contextlib.contextmanager
    def cut(self, affected: Peers = lambda port: True) -> Iterator[None]:
        """Cut the connections whose client's port is ``affected`` for the length of a ``with`` block."""
        self._affected = affected
        self._on_loop(lambda: self._cut.update(filter(affected, self._writers)))
        try:
            yield
        finally:
            self._affected = None
            self._on_loop(self._reset)

    def _on_loop(self, do: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (do(), done.set()))
        done.wait()

    def _reset(self) -> None:
        for port in self._cut:
            for writer in self._writers.get(port, ()):
                made: socket.socket = writer.get_extra_info("socket")
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
                writer.transport.abort()
        self._cut.clear()

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._ready.set()
        await self._end.wait()
        server.close()
        for writers in self._writers.values():
            for writer in writers:
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")[1]
        self._writers[peer] = [writer]
        if self._affected and await asyncio.to_thread(self._affected, peer):
            self._cut.add(peer)
        try:
            await self._while_cut(peer)
            onward, answers = await asyncio.open_connection(*self._target)
            self._writers[peer].append(answers)
            await asyncio.gather(self._pass(peer, reader, answers), self._pass(peer, onward, writer))
        except (OSError, asyncio.CancelledError):  # Python 3.11 writes a traceback for a handler that was cancelled
            pass
        finally:
            for each in self._writers.pop(peer, ()):
                each.transport.abort()
            self._cut.discard(peer)

    async def _pass(self, peer: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(_PIECE):
            await self._while_cut(peer)
            sink.write(data)
            await sink.drain()
        with contextlib.suppress(OSError):
            sink.write_eof()

    async def _while_cut(self, peer: int) -> None:
        while peer in self._cut:
            await asyncio.sleep(0.02)


def ports_of(pid: int) -> Peers:
    """Whether a port is the client's end of a connection that process ``pid`` has at the moment of asking."""

    def is_of(port: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(each.laddr.port == port for each in psutil.Process(pid).net_connections("tcp"))
        return False

    return is_of
