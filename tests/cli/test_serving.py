"""`harness serve` while it serves: what it says of ends and restarts, and when it gives up."""

import pytest

from harness.cli import serving
from harness.errors import ServerError


class Ended:
    """A server that ends as soon as it is started, until it is interrupted at its restart number ``until``."""

    url = "127.0.0.1:1"

    def __init__(self, until=99):
        self.restarted, self.until = 0, until

    def alive(self):
        return False

    def restarts(self):
        return []

    def last_words(self):
        return "tritonserver ended by signal 9; its last line: none; its log: l.log"

    def restart(self):
        self.restarted += 1
        if self.restarted == self.until:
            raise KeyboardInterrupt


def test_a_server_that_ends_is_started_again_and_its_user_is_told(capsys):
    with pytest.raises(KeyboardInterrupt):
        serving._attend(Ended(until=2))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("ended by signal 9") == 2 and said.count("was restarted at 127.0.0.1:1") == 1


def test_a_server_that_ends_again_and_again_is_given_up():
    server = Ended()
    with pytest.raises(ServerError, match="ended 4 times in a row within 30 s"):
        serving._attend(server)
    assert server.restarted == 3


def test_a_server_that_serves_for_a_while_between_its_ends_is_not_given_up(monkeypatch):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(serving.time, "monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):
        serving._attend(Ended(until=9))


def test_a_server_whose_restarts_take_long_is_given_up_all_the_same(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(serving.time, "monotonic", lambda: clock[0])
    server = Ended()
    start = server.restart
    server.restart = lambda: (start(), clock.__setitem__(0, clock[0] + 300))
    with pytest.raises(ServerError, match="4 times in a row"):
        serving._attend(server)


def test_what_ended_just_before_the_server_is_said(capsys):
    server = Ended(until=1)
    server.restarts = lambda: ["diffusion_decoder ended and was loaded again"]
    with pytest.raises(KeyboardInterrupt):
        serving._attend(server)
    assert "diffusion_decoder ended" in capsys.readouterr().out
