"""Ctrl-C and SIGTERM reach a test wherever they find the load generator."""

import subprocess
import sys

PLACES = ["a greenlet", "a finalizer", "the hub", "a finalizer in the hub", "the main greenlet"]
STRUCK = """
import os, signal
from types import SimpleNamespace

import gevent

from harness.drive.user import _heed_signals


def strike():
    os.kill(os.getpid(), number)
    sum(range(1000))  # Python runs the handler here


class Finalized:
    def __del__(self):
        strike()


def in_hub(function):
    gevent.get_hub().loop.run_callback(function)


PLACES = {
    "a greenlet": lambda: gevent.spawn(strike),
    "a finalizer": lambda: gevent.spawn(lambda: Finalized() and None),
    "the hub": lambda: in_hub(strike),
    "a finalizer in the hub": lambda: in_hub(Finalized),
    "the main greenlet": strike,
}
for number in (signal.SIGINT, signal.SIGTERM):
    for place, begin in PLACES.items():
        environment = SimpleNamespace(speech_interrupted=False)
        _heed_signals(environment)
        try:
            begin()
            gevent.sleep(5)
        except KeyboardInterrupt:
            print(number.name, place) if environment.speech_interrupted else None
"""


def test_a_signal_interrupts_the_main_greenlet():
    done = subprocess.run([sys.executable, "-c", STRUCK], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines() == [f"{name} {place}" for name in ("SIGINT", "SIGTERM") for place in PLACES]
    assert not done.stderr
