"""Lets clients misbehave in one way at a time, as fast as they can: which way ends Triton, or makes it grow.

With ``--as-installed`` the server offers the unary call that the harness closes (harness/deploy/unary.py).
"""

from __future__ import annotations

import itertools
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import grpc
import numpy as np
import psutil
from malformed import entry_message, request, stage_message
from tritonclient.grpc import service_pb2 as pb

from harness import wire
from harness.client.stream import infer_message
from harness.deploy.server import TritonServer

EXAMPLE = "python benchmarks/model/storm.py --seconds 60 --only 'unary call, deadline' --as-installed"
SERVICE = "/inference.GRPCInferenceService/"
CLIENTS = 4
PATIENCE_S = 20
LAST_LOOK_S = 3.0  # after a storm, for sessions to end
REFUSED = "Speaker 9: There is no such speaker."


class Client:
    """One connection, and the ways in which it may be used."""

    def __init__(self, url: str, seed: int):
        self.url, self.numbers = url, np.random.default_rng(seed)
        self._connect()

    def _connect(self) -> None:
        self.channel = grpc.insecure_channel(self.url, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stream = self.channel.unary_stream(
            f"{SERVICE}ModelStreamInfer", pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )
        self.unary = self.channel.unary_unary(f"{SERVICE}ModelInfer")

    def _take(self, message: pb.ModelInferRequest, answers: int | None, timeout_s: float = PATIENCE_S) -> None:
        self._read(self.stream(message, timeout=timeout_s), answers)

    def _read(self, call: grpc.Call, answers: int | None) -> None:
        """Read so many answers of a stream, None = all, then leave it."""
        try:
            for _ in itertools.islice(call, answers):
                pass
        except grpc.RpcError:
            pass
        finally:
            call.cancel()

    def refused_to_the_end(self) -> None:
        self._take(infer_message(request("r", REFUSED)), None)

    def refused_and_left(self) -> None:
        self._take(infer_message(request("r", REFUSED)), 1)

    def stage_and_left(self) -> None:
        self._take(stage_message(self.numbers, wire.LLM), 1)

    def left_in_mid_answer(self) -> None:
        self._take(infer_message(request("l", frames=400)), int(self.numbers.integers(3)))

    def stream_deadline(self) -> None:
        self._take(infer_message(request("d", frames=400)), None, float(self.numbers.uniform(0.001, 0.06)))

    def connection_closed(self) -> None:
        calls = [self.stream(infer_message(request("c", frames=400)), timeout=PATIENCE_S) for _ in range(4)]
        try:
            next(calls[0])
        except grpc.RpcError:
            pass
        self.channel.close()
        self._connect()

    def unary_deadline(self) -> None:
        data = stage_message(self.numbers, wire.LLM).SerializeToString()
        try:
            self.unary(data, timeout=float(self.numbers.uniform(0.0005, 0.006)))
        except grpc.RpcError:
            pass

    def unary_left(self) -> None:
        call = self.unary.future(stage_message(self.numbers, wire.LLM).SerializeToString())
        time.sleep(float(self.numbers.uniform(0, 0.004)))
        call.cancel()

    def malformed(self) -> None:
        data = bytearray(entry_message(self.numbers).SerializeToString())
        for _ in range(int(self.numbers.integers(1, 6))):
            data[int(self.numbers.integers(len(data)))] = int(self.numbers.integers(256))
        self._read(self.channel.unary_stream(f"{SERVICE}ModelStreamInfer")(bytes(data), timeout=PATIENCE_S), None)


WAYS: dict[str, Callable[[Client], None]] = {
    "refused, stream read to its end": Client.refused_to_the_end,
    "refused, left after the answer": Client.refused_and_left,
    "refused by a stage, left after the answer": Client.stage_and_left,
    "left in mid-answer": Client.left_in_mid_answer,
    "deadline of 1 to 60 ms in a stream": Client.stream_deadline,
    "connection closed with 4 streams": Client.connection_closed,
    "malformed messages": Client.malformed,
    "unary call, deadline of 0.5 to 6 ms": Client.unary_deadline,
    "unary call, left after 0 to 4 ms": Client.unary_left,
}


@dataclass(frozen=True)
class Storm:
    """What one way of misbehaving did; ``ended``: how the server ended, "" where it did not."""

    calls: int
    seconds: float
    ended: str
    grown_bytes: int

    @property
    def grown_kb_per_call(self) -> float:
        return self.grown_bytes / 1024 / max(1, self.calls)


def storm(server: TritonServer, way: Callable[[Client], None], seconds: float) -> Storm:
    """Misbehave over CLIENTS connections until the time is over or the server has ended."""
    calls, over, process = itertools.count(), threading.Event(), psutil.Process(server.pid)
    before, began_s = process.memory_full_info().uss, time.monotonic()

    def run(seed: int) -> None:
        client = Client(server.url, seed)
        while not over.is_set():
            way(client)
            next(calls)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while time.monotonic() < began_s + seconds and server.alive():
        time.sleep(0.2)
    over.set()
    took_s, sent = time.monotonic() - began_s, next(calls)
    for thread in threads:
        thread.join(PATIENCE_S)
    time.sleep(LAST_LOOK_S)
    if not server.alive():
        return Storm(sent, took_s, server.last_words(), 0)
    return Storm(sent, took_s, "", process.memory_full_info().uss - before)


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, EXAMPLE)
    parser.add_argument("--seconds", type=common.real(1, 3600), default=60, help="for each way; 60 unless given")
    parser.add_argument("--only", default="", help="the ways whose name contains this text; all unless given")
    parser.add_argument("--as-installed", action="store_true", help="with the unary call of the installed server")
    given = parser.parse_args(arguments)
    chosen = {name: way for name, way in WAYS.items() if given.only in name}
    if not chosen:
        parser.error(f"no way is called {given.only!r}: there are {', '.join(WAYS)}")
    closed = "harness.deploy.server.without_unary_call"
    with patch(closed, shutil.copy2) if given.as_installed else nullcontext(), common.served() as server:
        return report(storms(server, chosen, 2.0 if given.quick else given.seconds), given.as_installed)


def storms(server: TritonServer, ways: dict, seconds: float) -> dict[str, Storm]:
    found = {}
    for name, way in ways.items():
        common.say(f"{name} …")
        found[name] = storm(server, way, seconds)
        if found[name].ended:
            common.say(f"    {found[name].ended}")
            server.restart()
    return found


def report(found: dict[str, Storm], as_installed: bool) -> int:
    shown = common.table("Clients that misbehave", "in this way", "calls", "calls/s", "ended", "KB per call")
    for name, one in found.items():
        rate, grown = one.calls / one.seconds, "" if one.ended else f"{one.grown_kb_per_call:.1f}"
        shown.add_row(name, f"{one.calls:,}", f"{rate:.0f}", "yes" if one.ended else "no", grown)
    figures = {
        "calls": {name: one.calls for name, one in found.items()},
        "ended": {name: bool(one.ended) for name, one in found.items()},
        "grown_kb_per_call": {name: one.grown_kb_per_call for name, one in found.items() if not one.ended},
        "as_installed": as_installed,
    }
    common.finish(shown, figures)
    return common.EXIT_FAILED if any(one.ended for one in found.values()) else 0


if __name__ == "__main__":
    common.run(main)
