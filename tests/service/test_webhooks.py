"""Webhooks: which addresses are refused, and what arrives at those that are not."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from service_parts import opened, spec_of, until

from harness.errors import InputError
from harness.service import webhooks
from harness.service.housekeeping import Housekeeping


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "ff02::1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:0:0:0:0:80ff:fffe",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(monkeypatch, address):
    """Also behind a name, and inside another address."""
    monkeypatch.setattr(webhooks, "_resolved", lambda host, port: ["93.184.216.34", address])
    with pytest.raises(InputError, match="not a public one"):
        webhooks.checked("https://hook.example/", private=False)
    assert webhooks.checked("https://hook.example/", private=True).ip == "93.184.216.34"


def test_public_addresses_are_taken_and_pinned(monkeypatch):
    monkeypatch.setattr(webhooks, "_resolved", lambda host, port: ["93.184.216.34", "2606:2800:220:1::1"])
    found = webhooks.checked("https://hook.example/path?x=1", private=False)
    assert (found.scheme, found.host, found.port, found.path, found.ip) == (
        "https", "hook.example", 443, "/path?x=1", "93.184.216.34",
    )  # fmt: skip


@pytest.mark.parametrize(
    "url",
    [
        "", "hook.example", "ftp://hook.example/", "file:///etc/passwd", "http://", "http://user:secret@hook.example/",
        "http://hook.example:99999/", "http://[::1", "http://hook.example/\r\nX: y", "http://h\xf6ok.example/",
        "https://" + "x" * 3000, "http://2130706433/", "http://0x7f.1/", "http://localhost/", "http://127.1/",
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_webhook_is_refused(url):
    with pytest.raises(InputError) as refused:
        webhooks.checked(url, private=False)
    assert "secret" not in str(refused.value)


class Listener:
    """An HTTP server that answers with the statuses given, and then 200; ``events`` arrived."""

    def __init__(self, *statuses):
        self.events, answers = [], list(statuses)
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                listener.events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(answers.pop(0) if answers else 200)
                self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def run_hooks(settings, listener, calls, **more):
    async def main():
        made = settings(private_webhooks=True, **more)
        async with opened(made) as (queue, store):
            await queue.submit("a", "me", spec_of(webhook=listener.url), 9, "", "")
            await queue.cancel("a")
            keeping = Housekeeping(made, queue, store)

            async def condition():
                await keeping.once()
                return len(listener.events) >= calls

            await until(condition)
            await asyncio.sleep(0.1)
            await keeping.once()
            return await queue.due("hooks", 1.0)

    return asyncio.run(main())


def test_a_task_that_has_ended_is_told_once(settings):
    with Listener() as listener:
        run_hooks(settings, listener, 1)
    assert [each["status"] for each in listener.events] == ["cancelled"] and listener.events[0]["id"] == "a"


def test_a_webhook_that_fails_is_called_again_and_a_redirect_is_not_followed(settings, monkeypatch):
    monkeypatch.setattr("harness.service.housekeeping.HOOK_DELAY_S", 0.05)
    with Listener(500, 302) as listener:
        run_hooks(settings, listener, 3)
    assert len(listener.events) == 3


def test_a_webhook_that_never_answers_is_given_up(settings, monkeypatch):
    monkeypatch.setattr("harness.service.housekeeping.HOOK_DELAY_S", 0.01)
    monkeypatch.setattr("harness.service.housekeeping.HOOK_TRIES", 3)
    with Listener(*[500] * 9) as listener:
        assert run_hooks(settings, listener, 3) is None
    assert len(listener.events) == 3


def test_a_call_ends_in_time_however_slowly_the_answer_comes(monkeypatch):
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        over = threading.Event()

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 ")
                while not over.wait(0.1):
                    connection.sendall(b"2")

        dripping = threading.Thread(target=drip)
        dripping.start()
        address = webhooks.checked(f"http://127.0.0.1:{server.getsockname()[1]}/", private=True)
        began_s = time.monotonic()
        with pytest.raises((OSError, http.client.HTTPException)):
            webhooks.call(address, {})
        assert time.monotonic() - began_s < 60
        over.set()
        dripping.join()


def test_an_address_that_turned_private_is_not_called(settings):
    async def main(url):
        made = settings()  # private ones are refused
        async with opened(made) as (queue, store):
            await queue.submit("a", "me", spec_of(webhook=url), 9, "", "")
            await queue.cancel("a")
            await Housekeeping(made, queue, store).once()

    with Listener() as listener:
        asyncio.run(main(listener.url))
    assert listener.events == []
