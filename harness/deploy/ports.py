"""Ports of this host's loopback address."""

from __future__ import annotations

import socket
from collections import deque

from harness.errors import InputError, ServerError

_MOST_HELD = 64
_held: deque[socket.socket] = deque()  # a server may take minutes until it listens


def free_ports(count: int) -> list[int]:
    """Free ports of loopback, all different, and given to nobody else until this process has asked for 64 others.

    Each stays bound, but not listening, with SO_REUSEADDR: a server that sets it too, as usual servers do, can listen
    there, while the kernel chooses the port for no other socket.
    """
    given = []
    for _ in range(count):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
        given.append(one)
    _held.extend(given)
    while len(_held) > _MOST_HELD:
        _held.popleft().close()
    return [one.getsockname()[1] for one in given]


def must_be_free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # allows a port of a server that just ended
        try:
            probe.bind(("127.0.0.1", port))
        except OverflowError:
            raise InputError(f"{port} is not a port: use 1 to 65535, or leave out --port") from None
        except OSError as error:
            raise ServerError(
                f"port {port} cannot be used ({error.strerror}): choose another --port, or leave it out for a free one"
            ) from None
    return port
