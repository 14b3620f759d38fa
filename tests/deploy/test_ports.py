"""A port that was given is kept for its server until that listens there."""

import socket

import pytest

from harness.deploy import ports
from harness.deploy.ports import free_ports, must_be_free
from harness.errors import ServerError


def test_a_port_that_was_given_is_chosen_for_nobody_else_and_its_server_can_listen_there():
    """Seconds pass until a server listens; without this another process may get its port meanwhile."""
    (port,) = free_ports(1)
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)):  # it sets SO_REUSEADDR
        with socket.create_connection(("127.0.0.1", port), timeout=60):
            pass
        with pytest.raises(ServerError, match=f"port {port} cannot be used"):
            must_be_free(port)
    assert must_be_free(port) == port


def test_as_many_ports_are_kept_as_servers_can_be_about_to_start(monkeypatch):
    monkeypatch.setattr(ports, "_held", type(ports._held)())
    given = [port for _ in range(20) for port in free_ports(4)]
    assert len(ports._held) == ports._MOST_HELD and len(set(given[-ports._MOST_HELD :])) == ports._MOST_HELD
    for one in ports._held:
        one.close()
