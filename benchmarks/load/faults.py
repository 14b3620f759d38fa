"""The fate of requests when something fails: each must end once, and the endings must add up to what was sent.

instrument  20 requests are complete before the fault, 20 in progress when it occurs, 20 are sent after it
run         Locust itself with scenarios/podcast.py, headless, 20 requests/s, with the fault during the run

"taken" is the server's own count of the requests that reached it, if it survived the fault.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from fault_runs import (
    COUNT,
    LONGEST_S,
    PATIENCE_S,
    RATE_PER_S,
    RUN_FAULTS,
    WORDS,
    RunFault,
    Struck,
    kill_locust,
    struck,
    wait_for,
)
from testbed import FAILURE, Network, TimetableServer

from harness import wire
from harness.drive.readers.pool import ReaderPool, Ticket
from harness.records.schema import Outcome, Request, Result

FRAMES = 10
PROMPT = "every=0.01 first=0"
HELD = "every=0.01 first=0 hang=5"
RECONNECT_S = 3.0  # gRPC retries after a second at most
OUTCOMES = (Outcome.DONE, Outcome.ERROR, Outcome.CANCELLED, Outcome.UNFINISHED)
NUMBERS = r"(?<=:)\d{4,5}|\d+(?= samples| were| died)"  # ports, and what differs between errors of one kind
SHOWN = 150  # characters of the user's message shown in the table


@dataclass(frozen=True)
class Row:
    """One fault. ``wrong``: what is not as required. ``taken`` is None if the server did not survive."""

    part: str
    fault: str
    sent: int
    counts: tuple[int, ...]  # of OUTCOMES
    taken: int | None
    told: str
    wrong: tuple[str, ...] = ()


@dataclass
class Scene:
    """What a fault can act on."""

    server: TimetableServer
    network: Network
    pool: ReaderPool
    held: list[Ticket]

    def wait(self) -> None:
        """Wait until the requests in progress have ended."""
        for ticket in self.held:
            ticket.wait(PATIENCE_S)


def kill_server(scene: Scene) -> None:
    os.kill(scene.server.pid, signal.SIGKILL)
    scene.wait()


def replace_server(scene: Scene) -> None:
    kill_server(scene)
    scene.server.start_again()
    time.sleep(RECONNECT_S)


def cut_network(scene: Scene) -> None:
    scene.network.cut()
    scene.wait()
    scene.network.repair()
    time.sleep(RECONNECT_S)


def close_connection(scene: Scene) -> None:
    scene.network.close()
    scene.wait()


def reset_connection(scene: Scene) -> None:
    scene.network.reset()
    scene.wait()


def kill_reader(scene: Scene) -> None:
    scene.pool._readers[0].process.kill()
    scene.wait()


def cancel(scene: Scene) -> None:
    for ticket in scene.held:
        ticket.cancel()
    scene.wait()


@dataclass(frozen=True)
class Fault:
    """``held`` and ``after``: outcomes of requests in progress, and of later ones ("unsent": not yet due).

    ``taken``: how many of all requests the server must have received; None if it does not survive.
    """

    name: str
    strike: Callable[[Scene], None]
    held: str
    after: str
    told: str = ""
    words: str = HELD
    taken: int | None = 3 * COUNT


FAULTS = (
    Fault("stage error", Scene.wait, "error", "done", FAILURE, f"{PROMPT} error=5"),
    Fault("stream ends early", Scene.wait, "error", "done", "the stream ended with", f"{PROMPT} end=5"),
    Fault("connection closed", close_connection, "error", "done", "ended the connection"),
    Fault("connection reset", reset_connection, "error", "done", "ended the connection"),
    Fault("network cut for a while", cut_network, "error", "done", "sent nothing, not even an answer to a ping"),
    Fault("reader process killed", kill_reader, "error", "error", "stream-reader process", taken=2 * COUNT),
    Fault("client cancels", cancel, "cancelled", "done"),
    Fault("end of the window", lambda scene: None, "unfinished", "unsent", taken=2 * COUNT),
    Fault("server killed, another in its place", replace_server, "error", "done", "ended the connection", taken=None),
    Fault("server killed", kill_server, "error", "error", "ended the connection", taken=None),
)


def instrument(server: TimetableServer, fault: Fault) -> Row:
    """Inject the fault into a ReaderPool and count the outcomes of its requests."""
    taken_before = server.taken()
    with Network(server.url) as network:
        pool = ReaderPool(network.url)
        first = submit(pool, PROMPT)
        wait_for(lambda: all(ticket.wait(0) for ticket in first), "the first requests to end")
        scene = Scene(server, network, pool, submit(pool, fault.words))
        if fault.words == HELD:
            heard = COUNT * (FRAMES + 5) * wire.SAMPLES_PER_FRAME
            wait_for(lambda: pool.progress().samples == heard, "all requests to be in progress")
        fault.strike(scene)
        last = submit(pool, PROMPT, ahead_s=3600 if fault.after == "unsent" else 0)
        if fault.after != "unsent":
            wait_for(lambda: all(ticket.wait(0) for ticket in last), "the last requests to end")
        pool.close()
    taken = None if fault.taken is None else server.taken() - taken_before
    return judged(fault, [ticket.result for ticket in (*first, *scene.held, *last)], pool.submitted, taken)


def submit(pool: ReaderPool, words: str, ahead_s: float = 0) -> list[Ticket]:
    due_ns = time.monotonic_ns() + round(ahead_s * 1e9)
    script = f"Speaker 1: {words}"
    requests = (Request(f"{words} {n}", "short", script, (0,), FRAMES, due_ns=due_ns) for n in range(COUNT))
    return [pool.submit(request, "open") for request in requests]


def judged(fault: Fault, results: list[Result], submitted: int, taken: int | None) -> Row:
    sent = [result for result in results if not never_sent(result)]
    seen = Counter(str(result.outcome) for result in sent)
    expected = Counter(done=COUNT) + Counter({fault.held: COUNT}) + Counter({fault.after: COUNT})
    told = " · ".join(errors_of(sent))
    wrong = [*sum_faults(submitted - len(results) + len(sent), seen, taken, fault.taken, fault.taken)]
    if seen != Counter({name: count for name, count in expected.items() if name != "unsent"}):
        wrong.append(f"expected {dict(expected)}")
    if fault.told not in told:
        wrong.append(f"no message contains {fault.told!r}")
    return row("instrument", fault.name, len(sent), seen, taken, told, wrong)


def row(part: str, fault: str, sent: int, seen: Counter, taken: int | None, told: str, wrong: list[str]) -> Row:
    return Row(part, fault, sent, tuple(seen[outcome] for outcome in OUTCOMES), taken, told, tuple(wrong))


def sum_faults(sent: int, seen: Counter, taken: int | None, least: int | None, most: int | None) -> Iterator[str]:
    if seen.total() != sent:
        yield f"{seen.total()} endings of {sent} requests sent"
    if taken is not None and not least <= taken <= most:
        yield f"the server took {taken}, not {least}" + f" to {most}" * (most != least)


def never_sent(result: Result) -> bool:
    return not result.sent_ns and result.outcome in (Outcome.UNFINISHED, Outcome.CANCELLED)


def run(server: TimetableServer, fault: RunFault) -> Row:
    """Inject the fault into a run of Locust; compare its output with its records and the server's count."""
    left = struck(server, fault)
    return (judged_killed if fault.strike is kill_locust else judged_run)(fault, left)


def judged_run(fault: RunFault, left: Struck) -> Row:
    seen = Counter(str(result.outcome) for result in left.records.results)
    end = left.records.end
    sent = end.submitted - end.never_sent if end else 0
    unheard = sum(not len(result.chunks) for result in left.records.results)
    wrong = [*sum_faults(sent, seen, left.taken, sent - unheard, sent)]
    if ", ".join(f"{seen[outcome]} {outcome}" for outcome in OUTCOMES) not in left.said:
        wrong.append("Locust printed other counts")
    if {*seen, Outcome.UNFINISHED} != {*fault.ends, Outcome.UNFINISHED}:  # some may still be in progress
        wrong.append(f"not {' and '.join(fault.ends)}")
    if fault.told not in left.said:
        wrong.append(f"Locust did not say {fault.told!r}")
    told = " · ".join((verdict(left.said), *errors_of(left.records.results)))
    return row("run", fault.name, sent, seen, left.taken, told, wrong)


def judged_killed(fault: RunFault, left: Struck) -> Row:
    """Judge a run without an end: requests that the server received but the file lacks were in progress at the kill."""
    results = left.records.results
    seen = Counter(str(result.outcome) for result in results)
    numbers = sorted(int(result.request_id.rpartition("-")[2]) for result in results)
    over = int((left.at_ns - min(result.due_ns for result in results)) / 1e9 - LONGEST_S) * RATE_PER_S
    wrong = []
    if left.records.end:
        wrong.append("the records have an end")
    if numbers[:over] != list(range(over)):
        wrong.append(f"of the {over} requests that had ended, some are not recorded")
    if set(seen) != {Outcome.DONE}:
        wrong.append("a request is recorded that was not done")
    seen[Outcome.UNFINISHED] = left.taken - len(results)
    return row("run", fault.name, left.taken, seen, left.taken, "the records have no end: the test was killed", wrong)


def verdict(said: str) -> str:
    found = re.search(r"^ *(VALID|INVALID.*)", said, re.MULTILINE)
    return found[1] if found else "no verdict"


def errors_of(results: Iterable[Result]) -> list[str]:
    """The error messages, one for each kind: without the numbers in which they differ."""
    return sorted({re.sub(NUMBERS, "N", result.error) for result in results if result.error})


def rows(faults: Sequence[Fault], run_faults: Sequence[RunFault]) -> Iterator[Row]:
    """Each part on one server; faults that it does not survive come last."""
    for words, strike, each_of in (("", instrument, faults), (WORDS, run, run_faults)):
        if not each_of:
            continue
        with TimetableServer(words) as server:
            for fault in each_of:
                common.say(f"{fault.name} …")
                yield strike(server, fault)


def parser() -> common.Parser:
    return common.Parser(__doc__, "python benchmarks/load/faults.py")


def main(arguments: Sequence[str]) -> int:
    quick = parser().parse_args(arguments).quick
    seen = list(rows(FAULTS[:3], ()) if quick else rows(FAULTS, RUN_FAULTS))
    table = common.table("Faults", "fault", "sent", "done", "failed", "cancelled", "unfinished", "taken", "sum")
    table.add_column("told", overflow="fold")
    for one in seen:
        figures = (one.sent, *one.counts, "-" if one.taken is None else one.taken)
        table.add_row(f"{one.part}: {one.fault}", *map(str, figures), "; ".join(one.wrong) or "right", shown(one.told))
    right = sum(not one.wrong for one in seen)
    common.finish(table, {"faults": len(seen), "right": right, "rows": [dataclasses.asdict(one) for one in seen]})
    return common.EXIT_FAILED if right < len(seen) else 0


def shown(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


if __name__ == "__main__":
    common.run(main)
