"""A stream that a caller listens to, when the caller leaves."""

import asyncio
from types import SimpleNamespace
from unittest import mock

from harness import wire
from harness.records.schema import Outcome
from harness.service import speech
from harness.service.task import TaskSpec


class Full:
    """A server without room, whose refusal comes just as the listener leaves: ``run`` returns it all the same."""

    def __init__(self):
        self.opened, self.heard = 0, asyncio.Event()

    def open(self, *_, **__):
        self.opened += 1
        return SimpleNamespace(run=self.run, stop=mock.Mock())

    async def run(self):
        self.heard.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
        return SimpleNamespace(outcome=Outcome.ERROR, error=f"{wire.BUSY}no room")


def test_a_listener_who_leaves_as_a_refusal_comes_opens_no_other_stream(monkeypatch):
    monkeypatch.setattr(speech, "AGAIN_S", 0.0)

    async def scene():
        client = Full()
        spec = TaskSpec(script="Speaker 1: Hello.", voices=(1,), frames=4, estimate=4)
        live = speech.LiveSpeech(client, mock.AsyncMock(), spec, patience_s=60.0, owner="a", most=1)
        async with asyncio.timeout(10):
            async with live:
                await client.heard.wait()
        return client.opened

    assert asyncio.run(scene()) == 1
