"""The proxy with which the fault benchmark cuts parts of the service off from each other."""

import socket
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "service"))

from cut_wire import CutWire  # noqa: E402


@contextmanager
def echo():
    """A server that sends back what it gets; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(connection):
            with connection, suppress(OSError):
                while data := connection.recv(1024):
                    connection.sendall(data)

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


@pytest.fixture
def wire():
    with echo() as port, CutWire("127.0.0.1", port) as made:
        yield made


def called(wire):
    connection = socket.create_connection(("127.0.0.1", wire.port), timeout=60)
    connection.sendall(b"one")
    assert connection.recv(10) == b"one"
    return connection


def test_a_cut_connection_carries_nothing_and_is_reset_afterwards(wire):
    cut, spared = called(wire), called(wire)
    with wire.cut(lambda port: port == cut.getsockname()[1]):
        spared.sendall(b"two")
        assert spared.recv(10) == b"two", "others go on"
        cut.sendall(b"two")
        cut.settimeout(0.2)
        with pytest.raises(TimeoutError):
            cut.recv(10)
    cut.settimeout(60)
    with pytest.raises(ConnectionError):
        assert cut.recv(10)
        cut.recv(10)
    called(wire).close()
    spared.close()


def test_who_comes_while_it_is_cut_is_not_served(wire):
    with wire.cut():
        late = socket.create_connection(("127.0.0.1", wire.port), timeout=60)
        late.sendall(b"one")
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.recv(10)
    late.close()
    called(wire).close()
