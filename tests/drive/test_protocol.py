"""Messages between a load generator and its readers arrive as they were sent, however the socket cuts them."""

import dataclasses
import math
import subprocess
import sys
import typing
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from test_user import result

from harness.client.replicas import ConnectionStatistics
from harness.client.target import Target
from harness.drive.readers import protocol
from harness.drive.readers.live_stats import Progress, Running
from harness.records.schema import Request

URL = "127.0.0.1:8001"
REQUEST = Request("r", "short", "Speaker 1: Grüße.", (0, 3), 9, due_ns=5, say=(1, 2), keep=True, carry=b"\x00\xff")
MESSAGES = [
    protocol.Connect(Target.of(URL, headers=(("authorization", "Bearer s3cret"),), request_s=9.0), 1, 3),
    protocol.Submit(7, REQUEST, "open"),
    protocol.Cancel(7),
    protocol.Finish(2.5),
    protocol.Ready(4711),
    protocol.Refused("no Triton answers"),
    protocol.Returned(7, result()),
    protocol.ProgressSample(Progress(1, 2, 3200, 1, 1.5, (Running("long", 0.5, 0.8, 1, 3.0, "r"),))),
    protocol.TimerLag(0.001),
    protocol.ConnectionTotals(ConnectionStatistics(Counter({URL: 2}), Counter(), {URL: 5}, Counter({URL: 3}), {})),
]


def same(one, other) -> bool:
    """Equality of messages; Results hold arrays, which have none of their own."""
    if isinstance(one, protocol.Returned):
        return protocol.to_bytes(one) == protocol.to_bytes(other)
    return one == other


def test_every_kind_of_message_is_tried():
    assert {type(each) for each in MESSAGES} == set(typing.get_args(protocol.Message))
    assert all(dataclasses.is_dataclass(each) and each.__dataclass_params__.frozen for each in MESSAGES)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20))
def test_messages_arrive_whole_and_in_order_whatever_pieces_they_come_in(sizes):
    data, inbox, received = b"".join(map(protocol.to_bytes, MESSAGES)), protocol.Inbox(), []
    while data:
        size = sizes[len(data) % len(sizes)]
        received += inbox.feed(data[:size])
        data = data[size:]
    assert [type(each) for each in received] == [type(each) for each in MESSAGES]
    assert all(map(same, received, MESSAGES))


def test_a_reader_without_timers_says_so():
    (lag,) = protocol.Inbox().feed(protocol.to_bytes(protocol.TimerLag(math.nan)))
    assert math.isnan(lag.p99_s)


def test_a_reader_process_loads_nothing_of_the_load_generator_and_of_statistics():
    absent = ("harness.drive.readers.pool", "locust", "gevent", "pandas", "pyarrow", "scipy")
    code = f"import sys, harness.drive.readers.process; print([each for each in {absent} if each in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
