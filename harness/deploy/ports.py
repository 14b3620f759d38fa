"""Ports of this host's loopback address."""

from __future__ import annotations

import contextlib
import socket

from harness.errors import InputError, ServerError


def free_ports(count: int) -> list[int]:
    """Free ports of loopback, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


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
