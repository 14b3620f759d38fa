"""Attacks a server with seeded, malformed and oversized requests, and watches one honest stream beside them.

Requests go to the entry, to the stages behind it, to calls that change a server, and as raw bytes. Then each case that
once delayed other clients, or ended a process, runs separately.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import grpc
import numpy as np
import psutil
from malformed import SCRIPT, STAGE_INPUTS, control_call, entry_message, request, stage_message
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from victim import Victim

from harness import wire
from harness.client.stream import infer_message
from harness.deploy.control import CONTROL_HEADER
from harness.deploy.server import TritonServer
from harness.vibevoice.sessions.table import is_alive

EXAMPLE = "python benchmarks/model/fuzz.py --requests 5000 --seed 1"
CLIENTS = 4
SERVICE = "/inference.GRPCInferenceService/"
STAGES = (wire.FRAME, *wire.STAGES, wire.VOICE)
UNCLEAR = re.compile(r"\b[A-Z]\w*(Error|Exception)\b|Traceback|\.py\(\d+\)")
GROWTH_BYTES = 48 << 20  # of all processes after warm-up; allocators grow in steps
GAP_MS = 1_000
PROGRESS_S = 10
PATIENCE_S = 5  # for the first response to a request
HOLD_S = 30  # for a greedy one to be served: what it delays is then known
HONEST = ("entry", "bytes", "dropped")  # kinds of requests that may be served
DENIED = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass
class Tally:
    """Outcomes of the requests, counted by several threads."""

    answers: Counter = field(default_factory=Counter)
    hijacks: list[str] = field(default_factory=list)
    unclear: Counter = field(default_factory=Counter)
    crashed: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)  # the server has ended

    @property
    def sent(self) -> int:
        return sum(list(self.answers.values()))

    def judge(self, kind: str, error: str | None) -> None:
        """The outcome of one request: an error's text, "" for one that was served, None for no response in time."""
        self.answers[(kind, "no answer" if error is None else "refused" if error else "served")] += 1
        if error and UNCLEAR.search(error):
            self.unclear[f"{kind}: {error[:160]}"] += 1
        if error == "" and kind not in HONEST:
            self.hijacks.append(kind)


class Watch:
    """The processes of a server: which ended, and what they hold."""

    def __init__(self, server: TritonServer, tally: Tally):
        self.server, self.tally = server, tally
        self.known = self._children()
        self.zombies: set[int] = set()

    def _tree(self) -> list[psutil.Process]:
        main = psutil.Process(self.server.pid)
        return [main, *main.children(recursive=True)]

    def _children(self) -> dict[int, str]:
        """By pid, the command of each process: "" for a zombie."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return {process.pid: " ".join(asked(process.cmdline, [])[1:2]) for process in self._tree()[1:]}
        return {}

    def look(self, after: str) -> None:
        if self.tally.is_over.is_set():
            return
        now = self._children() if self.server.alive() else {}
        if not now:
            self.tally.is_over.set()
            self.tally.crashed.append(f"{self.server.last_words()}; last: {after}")
        for pid in self.known.keys() - now.keys():
            self.tally.crashed.append(f"{self.known[pid]} ended; last: {after}")
        for pid in now:
            if pid in self.known and pid not in self.zombies and not is_alive(pid):
                self.zombies.add(pid)
                self.tally.crashed.append(f"{self.known[pid]} is a zombie; last: {after}")
        self.known = {pid: self.known.get(pid, name) for pid, name in now.items()}

    def holds(self) -> dict[str, float]:
        """Processes, threads, shared-memory files and bytes of memory; sessions and KV cache by the metrics page."""
        tree = self._tree()
        return {
            "processes": len(tree),
            "threads": sum(asked(process.num_threads, 0) for process in tree),
            "regions": len(list(Path("/dev/shm").glob(f"{self.server.shm_prefix}*"))),
            "memory": sum(asked(lambda each=process: each.memory_full_info().uss, 0) for process in tree),
            **common.held(self.server.metrics_url),
        }


def asked(fact: Callable, otherwise):
    """A fact of a process; ``otherwise`` if it has ended meanwhile or is a zombie (ZombieProcess)."""
    try:
        return fact()
    except psutil.NoSuchProcess:
        return otherwise


class Attacker:
    """One connection that sends its share of the requests."""

    def __init__(self, url: str, seed: int, tally: Tally, victim_pids: Sequence[int], stages: Sequence[str] = STAGES):
        self.stages = stages
        self.numbers = np.random.default_rng(seed)
        self.channel, self.tally, self.pids = grpc.insecure_channel(url), tally, victim_pids
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        # One request per stream: gRPC's own call for many starts a thread for each, which costs most of this client.
        self.streamed = self.channel.unary_stream(
            f"{SERVICE}ModelStreamInfer", pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )
        self.last = ""

    def attack(self, count: int) -> None:
        kinds = (
            self._entry,
            self._entry,
            self._entry,
            self._stage,
            self._stage,
            self._bytes,
            self._control,
            self._drop,
        )
        with self.channel:
            for _ in range(count):
                if self.tally.is_over.is_set():
                    return
                kinds[int(self.numbers.integers(len(kinds)))]()

    def _entry(self) -> None:
        self._send("entry", entry_message(self.numbers))

    def _stage(self) -> None:
        stage, guess = self.stages[int(self.numbers.integers(len(self.stages)))], None
        if self.numbers.integers(3) == 0:  # an id that an entry may have given
            pid = int(self.pids[int(self.numbers.integers(len(self.pids)))])
            guess = (pid << int(self.numbers.choice([32, 42]))) + int(self.numbers.integers(200))
        self._send("stage", stage_message(self.numbers, stage, guess))

    def _any_stage(self) -> pb.ModelInferRequest:
        return stage_message(self.numbers, self.stages[int(self.numbers.integers(len(self.stages)))])

    def _send(self, kind: str, message: pb.ModelInferRequest) -> None:
        self.last = f"{kind} {message.model_name} {[(i.name, list(i.shape)) for i in message.inputs]}"[:300]
        self.tally.judge(kind, self._answer(message))

    def _answer(self, message) -> str | None:
        stream = self.streamed(message, timeout=PATIENCE_S)
        try:
            answer = next(stream, None)
            return None if answer is None else answer.error_message
        except grpc.RpcError as error:
            return None if error.code() in DENIED else f"{error.code().name}: {error.details()}"
        finally:
            stream.cancel()

    def _bytes(self) -> None:
        """A message with bytes changed, removed or inserted, bypassing protobuf libraries."""
        message = entry_message(self.numbers) if self.numbers.integers(2) else self._any_stage()
        whole = bytearray(message.SerializeToString())
        for _ in range(int(self.numbers.integers(1, 6))):
            if whole:
                whole[int(self.numbers.integers(len(whole)))] = int(self.numbers.integers(256))
        data = bytes(whole[: int(self.numbers.integers(len(whole) + 1))] if self.numbers.integers(4) == 0 else whole)
        method = ("ModelInfer", "ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady")[
            int(self.numbers.integers(5))
        ]
        # This call never succeeds: the entry responds only in streams, and stages accept only calls of the entry.
        kind = "bytes, infer" if method == "ModelInfer" else "bytes"
        self.last = f"bytes {method}"
        try:
            self.channel.unary_unary(SERVICE + method)(data, timeout=PATIENCE_S)
            self.tally.judge(kind, "")
        except grpc.RpcError as error:
            self.tally.judge(kind, None if error.code() in DENIED else f"{error.code().name}: {error.details()}")

    def _control(self) -> None:
        method, message = control_call(self.numbers)
        key = (None, ((CONTROL_HEADER, "0" * 64),), ((CONTROL_HEADER, ""),))[int(self.numbers.integers(3))]
        self.last = f"control {method}"
        try:
            getattr(self.stub, method)(message, timeout=PATIENCE_S, metadata=key)
            self.tally.judge(f"control {method}", "")
        except grpc.RpcError as error:
            self.tally.judge("control", f"{error.code().name}: {error.details()}")

    def _drop(self) -> None:
        """A client that leaves its stream before its end."""
        stream = self.streamed(infer_message(request("dropped", frames=400)), timeout=PATIENCE_S)
        try:
            for _ in itertools.islice(stream, int(self.numbers.integers(3))):
                pass
            self.tally.judge("dropped", "")
        except grpc.RpcError as error:
            self.tally.judge("dropped", f"{error.code().name}: {error.details()}")
        finally:
            stream.cancel()


def attack(url: str, count: int, seed: int, tally: Tally, watch: Watch) -> None:
    """Send ``count`` requests over CLIENTS connections, checking the processes meanwhile."""
    stages = [stage for stage in STAGES if stage in watch.server.deployment.models]
    attackers = [Attacker(url, seed * 1_000 + i, tally, list(watch.known), stages) for i in range(CLIENTS)]
    sent_before, told_s = tally.sent, time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(a.attack, count // CLIENTS) for a in attackers]
        while not all(future.done() for future in futures):
            time.sleep(0.2)
            watch.look("; ".join(a.last for a in attackers))
            if time.monotonic() >= told_s + PROGRESS_S:
                told_s = time.monotonic()
                common.say(f"{tally.sent - sent_before:,} of {count:,} requests sent")
        for future in futures:
            future.result()


# ── Cases that delayed others ─────────────────────────────────────────────────────────────────────────────────────────


def blocking_cases() -> dict[str, Callable[[], list[pb.ModelInferRequest]]]:
    """By name, messages that are sent at once."""
    numbers = np.random.default_rng(0)

    def starts():
        messages = []
        for i in range(512):
            message = pb.ModelInferRequest(model_name=wire.LLM)
            kind, shape, content = STAGE_INPUTS[wire.LLM][wire.SESSION]
            message.inputs.add(name=wire.SESSION, datatype=kind, shape=shape)
            message.raw_input_contents.append(content)
            message.parameters["sequence_id"].int64_param = 10_000 + i + int(numbers.integers(1 << 40))
            message.parameters["sequence_start"].bool_param = True
            messages.append(message)
        return messages

    def six(script: str, **more):
        return [infer_message(request(f"greedy {i}", script, **more)) for i in range(6)]

    words = "It is early, and the market has not opened yet. " * 10_000
    return {
        "512 STARTs at the LLM stage": starts,
        "6 scripts of 500,000 newlines": lambda: six("Speaker 1: a" + "\n" * 500_000),
        "6 scripts of 500,000 line ends with spaces": lambda: six("Speaker 1: a" + "\n \n" * 166_000),
        "6 scripts of 480,000 letters in words": lambda: six(f"Speaker 1: {words}"),
        "6 scripts of 480,000 letters in one word": lambda: six("Speaker 1: " + "a" * 480_000),
        "6 scripts of 30,000 turns": lambda: six("Speaker 1: a\n" * 30_000),
        "6 scripts of 200,000 letters in words": lambda: six(f"Speaker 1: {words[:200_000]}"),
        "6 requests with start_frame 40,000": lambda: six(SCRIPT, start_frame=40_000, frames=20),
    }


def hold_up(url: str, messages: list[pb.ModelInferRequest]) -> None:
    """Send all messages at once, and wait until each has ended, or its client has left after HOLD_S."""
    with grpc.insecure_channel(url, options=[("grpc.max_send_message_length", -1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def one(message) -> None:
            try:
                for answer in stub.ModelStreamInfer(iter([message]), timeout=HOLD_S):
                    if answer.error_message or answer.infer_response.parameters["triton_final_response"].bool_param:
                        return
            except grpc.RpcError:
                return

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(one, messages))


def leaks(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What grew from warm-up to the end, in a phrase each."""
    limits = {"threads": 32, "memory": GROWTH_BYTES}
    grown = [
        f"{name}: {before[name]:,.0f} to {after[name]:,.0f}"
        for name in before
        if after[name] - before[name] > limits.get(name, 0)
    ]
    return grown


def settled(watch: Watch, seconds: float) -> dict[str, float]:
    """What a server holds once its last sessions have ended."""
    deadline = time.monotonic() + seconds
    holds = watch.holds()
    while time.monotonic() < deadline:
        time.sleep(1.0)
        holds = watch.holds()
    return holds


def parts_of(requests: int) -> Iterator[int]:
    """The warm-up, after which nothing may grow, and the rest."""
    warm_up = max(CLIENTS, requests // 4)
    yield warm_up
    yield requests - warm_up


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--requests", type=common.whole(8, 10**8), default=100_000, help="requests; 100000 unless given"
    )
    parser.add_argument(
        "--seed", type=common.whole(0, 2**31), default=0, help="seed of all random choices (default: 0)"
    )
    parser.add_argument(
        "--topology",
        choices=tuple(wire.TOPOLOGIES),
        default=wire.STAGED,
        help="how it is deployed; staged unless given",
    )
    given = parser.parse_args(arguments)
    count = min(given.requests, 400) if given.quick else given.requests
    with common.served(topology=given.topology) as server:
        return report(*fuzz(server, count, given.seed))


def fuzz(server: TritonServer, count: int, seed: int):
    tally, gaps_ms = Tally(), {}
    watch = Watch(server, tally)
    with Victim(server.url) as victim:
        warm_up, rest = parts_of(count)
        attack(server.url, warm_up, seed, tally, watch)
    if tally.is_over.is_set():
        return tally, math.nan, victim, gaps_ms, []
    before, mib = settled(watch, 3), common.memory_mib(server)
    with victim.again() as victim:
        common.say(f"that was the warm-up: {tally.sent:,} requests sent, {count:,} in all …")
        began_s = time.monotonic()
        attack(server.url, rest, seed + 1, tally, watch)
        attacked_s = time.monotonic() - began_s
        gaps_ms[f"{count:,} malformed requests"] = victim.largest_gap_ms()
    if tally.is_over.is_set():
        return tally, math.nan, victim, gaps_ms, []
    grown = leaks(before, settled(watch, 5))
    for name, now in common.memory_mib(server).items():
        common.say(f"memory of {name}: {mib.get(name, 0):.0f} to {now:.0f} MiB")
    with victim.again() as victim:
        for name, messages in blocking_cases().items():
            common.say(f"{name} …")
            victim.largest_gap_ms()
            began_s = time.monotonic()
            hold_up(server.url, messages())
            watch.look(name)
            gaps_ms[name] = victim.largest_gap_ms(at_least=20)
            common.say(f"    a gap of {gaps_ms[name]:.0f} ms, in {time.monotonic() - began_s:.1f} s")
    # sessions of 40,000 frames are legitimate: the allocator keeps their memory for later ones
    after = settled(watch, 5)
    return tally, rest / attacked_s, victim, gaps_ms, [*grown, *leaks(before, after | {"memory": before["memory"]})]


def report(tally: Tally, requests_per_s: float, victim: Victim, gaps_ms: dict[str, float], grown: list[str]) -> int:
    answers = common.table(f"Answers, beside {victim.streams} streams of an honest client", "to", "answer", "requests")
    for (kind, answer), count in sorted(tally.answers.items()):
        answers.add_row(kind, answer, f"{count:,}")
    gaps = common.table("Slowest gap between two chunks of the honest client", "meanwhile", "ms")
    for name, gap in gaps_ms.items():
        gaps.add_row(name, f"{gap:.0f}")
    unclear = [f"{n} x {text}" for text, n in tally.unclear.most_common(20)]
    for line in (*tally.crashed, *tally.hijacks, *victim.failures, *grown, *unclear)[:60]:
        common.say(f"! {line}")
    figures = {
        "requests": tally.sent,
        "requests_per_s": round(requests_per_s, 1) if math.isfinite(requests_per_s) else None,  # after the warm-up
        "crashes": len(tally.crashed),
        "hijacks": len(tally.hijacks),
        "victim_failed": len(victim.failures),
        "leaks": len(grown),
        "unclear": sum(tally.unclear.values()),
        "victim_gap_ms_max": round(max(gaps_ms.values()), 1) if gaps_ms else None,
        "load_per_core": os.getloadavg()[1] / (os.cpu_count() or 1),  # gaps on a busy host are not the server's
    }
    common.finish([answers, gaps], figures)
    wrong = any(figures[name] for name in ("crashes", "hijacks", "victim_failed", "leaks", "unclear"))
    return common.EXIT_FAILED if wrong or (figures["victim_gap_ms_max"] or 0) > GAP_MS else 0


if __name__ == "__main__":
    common.run(main)
