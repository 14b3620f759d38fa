"""Do rules and dashboards of ops/ work? A real Prometheus scrapes real servers under load, and is asked all of it.

Starts Triton in both topologies, Prometheus and a small load. Then every query of every panel must have data, every
rule must be evaluated, and what the alerts compare must be there. Also `promtool check` and `test rules`, and the
manifests where ops/ has them. `make ops-check` runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from asked import PanelQuery, operands, panel_queries
from drawn_panels import draw
from prometheus_server import FOLDER, PrometheusServer, prometheus, promtool
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

from harness import wire  # noqa: E402
from harness.client.stream import SpeechClient  # noqa: E402
from harness.deploy.server import TritonServer  # noqa: E402
from harness.errors import HarnessError  # noqa: E402
from harness.records.schema import Outcome  # noqa: E402

MANIFESTS = Path(__file__).resolve().parents[2] / "ops" / "check_manifests.py"
STREAMS, FRAMES, UNKNOWN_VOICE = 2, (8, 40), 999
LOAD_S, QUICK_S = 60, 12


@dataclass
class Answers:
    """What Prometheus knows: queries without data, and rules that failed, by their names."""

    queries: list[PanelQuery]
    empty: list[PanelQuery] = field(default_factory=list)
    without_gpu: list[PanelQuery] = field(default_factory=list)
    rules: Counter = field(default_factory=Counter)  # by type
    faults: list[str] = field(default_factory=list)  # of rules


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    static = checked_by_promtool()
    objects, failures = checked_manifests()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(common.served(topology=each)) for each in wire.TOPOLOGIES]
        targets = [server.metrics_url.removeprefix("http://").removesuffix("/metrics") for server in servers]
        stack.enter_context(load(servers))
        asked = stack.enter_context(prometheus(targets))
        began_s, seconds = time.time(), options.seconds or (QUICK_S if options.quick else LOAD_S)
        common.say(f"load for {seconds} s, scraped every second …")
        time.sleep(seconds)
        answers = answers_of(asked)
        if options.draw:
            draw(asked, answers.queries, began_s, options.draw)
    for words in [*(said for passed, said in static.values() if not passed), *failures, *complaints(answers)]:
        common.say(words)
    shown = [static_table(static, objects, failures), answer_table(answers)]
    common.finish(shown, figures(static, objects, failures, answers))
    passed = all(passed for passed, _ in static.values()) and not failures and not answers.empty
    return 0 if passed and not answers.faults else common.EXIT_FAILED


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/ops/check.py --seconds 60 --draw build/panels.png")
    made.add_argument("--seconds", type=common.whole(5, 3600), default=0, help=f"of load, {LOAD_S} unless quick")
    made.add_argument("--draw", type=Path, default=None, help="a .png to draw the panels to (needs a Chromium)")
    return made


# Without servers


def checked_by_promtool() -> dict[str, tuple[bool, str]]:
    """promtool's checks: whether each passed, and what it said."""
    tests = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("tests/*.yml"))
    rules = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("rules/*.yml"))
    return {
        "promtool check config": promtool("check", "config", "prometheus.yml"),
        "promtool check rules": promtool("check", "rules", *rules),
        **{f"promtool test rules {test}": promtool("test", "rules", test) for test in tests},
    }


def checked_manifests() -> tuple[int, list[str]]:
    """Kubernetes objects that were validated, and what is wrong with them; none where ops/ has no manifests."""
    if not MANIFESTS.exists():
        return 0, []
    spec = importlib.util.spec_from_file_location("check_manifests", MANIFESTS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.check()
    return found["objects"], [str(each) for each in found["failures"]]


# Load


@contextlib.contextmanager
def load(servers: Sequence[TritonServer]) -> Iterator[None]:
    """Streams on every server until the end of the block, some of which leave or ask for what there is not."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        speaking = pool.submit(lambda: asyncio.run(_load([server.url for server in servers], over)))
        try:
            yield
        finally:
            over.set()
    speaking.result()


async def _load(urls: Sequence[str], over: threading.Event) -> None:
    await asyncio.gather(*(_stream(url, number, over) for url in urls for number in range(STREAMS + 1)))


async def _stream(url: str, number: int, over: threading.Event) -> None:
    """One request after another: the last stream of a server is a client who leaves, or asks for an unknown voice."""
    odd = number == STREAMS
    async with SpeechClient(url) as client:
        turn = 0
        while not over.is_set():
            turn += 1
            frames = FRAMES[turn % 2]
            if odd and turn % 2:
                await client.speak(common.request("refused", frames, voices=(UNKNOWN_VOICE,)), "closed")
                await asyncio.sleep(1)
                continue
            leaving = common.leave_after(3 if odd else 0)
            result = await client.open(common.request("load", frames, seed=turn), "closed", on_chunk=leaving).run()
            if result.outcome is Outcome.ERROR:
                raise HarnessError(f"the load failed: {result.error}")


# Questions


def answers_of(asked: PrometheusServer) -> Answers:
    answers = Answers(panel_queries())
    has_gpu = bool(asked.ask("nv_gpu_utilization"))
    for query in answers.queries:
        if not has_gpu and query.needs_gpu:
            answers.without_gpu.append(query)
        elif not asked.ask(query.expression):
            answers.empty.append(query)
    for rule in asked.rules():
        answers.rules[rule["type"]] += 1
        answers.faults += faults_of(rule, asked)
    return answers


def faults_of(rule: dict, asked: PrometheusServer) -> list[str]:
    """What is wrong with a rule as it was evaluated."""
    if rule["health"] != "ok":
        return [f"rule {rule['name']} is {rule['health']}: {rule.get('lastError', '')}"]
    compared = [rule["name"]] if rule["type"] == "recording" else operands(rule["query"])
    return [f"rule {rule['name']} has no data: {each}" for each in compared if not asked.ask(each)]


def complaints(answers: Answers) -> list[str]:
    return [f"no data: {one.board}, {one.panel}: {one.expression}" for one in answers.empty] + answers.faults


# Result


def static_table(static: dict[str, tuple[bool, str]], objects: int, failures: list[str]) -> Table:
    shown = common.table("Without servers", "check", "result")
    for name, (passed, _) in static.items():
        shown.add_row(name, "passed" if passed else "FAILED")
    manifests = f"{objects} objects, {len(failures)} failures" if MANIFESTS.exists() else "none here"
    shown.add_row("Kubernetes manifests", manifests)
    return shown


def answer_table(answers: Answers) -> Table:
    columns = "dashboard", "panels", "queries", "no data", "needs a GPU"
    shown = common.table("Asked of Prometheus, which scrapes both topologies under load", *columns)
    for board in dict.fromkeys(query.board for query in answers.queries):
        ours = [
            [one for one in found if one.board == board]
            for found in (answers.queries, answers.empty, answers.without_gpu)
        ]
        shown.add_row(board, *map(str, (len({one.panel for one in ours[0]}), *map(len, ours))))
    for kind, count in sorted(answers.rules.items()):
        shown.add_row(f"rules: {kind}", "", str(count), "", "")
    shown.add_row("rules that fail or have no data", "", "", str(len(answers.faults)), "")
    return shown


def figures(static: dict, objects: int, failures: list[str], answers: Answers) -> dict[str, int]:
    return {
        "objects": objects,
        "object_failures": len(failures),
        "queries": len(answers.queries),
        "empty": len(answers.empty),
        "needs_gpu": len(answers.without_gpu),
        "recording_rules": answers.rules["recording"],
        "alerts": answers.rules["alerting"],
        "rule_failures": len(answers.faults),
        "promtool_checks": len(static),
        "promtool_failures": sum(not passed for passed, _ in static.values()),
    }


if __name__ == "__main__":
    common.run(main)
