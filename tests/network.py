"""A network that fails when told to: a TCP proxy on loopback that delays, stops, closes or resets what it carries."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading


class Network:
    """Carries connections to ``target`` (host:port) from its own ``url``; a context manager, served by a thread.

    ``delay_s`` is the time that every byte from the server takes on its way.
    """

    def __init__(self, target: str, delay_s: float = 0.0):
        host, port = target.split(":")
        self._target, self._delay_s = (host, int(port)), delay_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()

    def __enter__(self) -> Network:
        self._thread.start()
        self._do(self._open())
        return self

    def __exit__(self, *_) -> None:
        self._do(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(120)
        self._loop.close()

    def cut(self) -> None:
        """Carry nothing more, either way, and say nothing of it: no end, no reset."""
        self._loop.call_soon_threadsafe(self._carries.clear)

    def repair(self) -> None:
        self._loop.call_soon_threadsafe(self._carries.set)

    def close(self) -> None:
        """End every connection in good order (FIN); new ones are taken."""
        self._do(self._end())

    def reset(self) -> None:
        """Reset every connection (RST); new ones are taken."""
        self._do(self._end(b"reset"))

    def _do(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    async def _open(self) -> None:
        self._carries = asyncio.Event()
        self._carries.set()
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:  # no server: the caller learns it as it would without us
            return writer.transport.abort()
        self._writers.add(far_writer)
        for ends in ((reader, far_writer, 0.0), (far_reader, writer, self._delay_s)):
            task = self._loop.create_task(self._carry(*ends))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._carries.wait()
                self._loop.call_later(delay_s, writer.write, data) if delay_s else writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    async def _end(self, how: bytes = b"") -> None:
        writers, self._writers = self._writers, set()
        for writer in writers:
            if writer.is_closing():
                continue
            if how:  # a linger of 0 s makes the close a reset
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort() if how else writer.close()

    async def _shut(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await self._end(b"reset")
