"""The staged ensemble and the fused engine in the same real Triton: the same streams on each in turn.

audio s/s    seconds of audio per second of all streams together, while all of them speak
step ms      time between two frames of a stream, the median stream's mean
p99 ms       of the gaps between two responses of a stream
chunk        frames per response: the engine sends waiting frames together
CPU ms       CPU milliseconds per frame: of the server's processes, and of the reader
model ms     a step of the same batch in this process, with nothing around it: the lower bound here
share        model ms / step ms of the fused engine
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import psutil
from rich.table import Table

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.server import TritonServer
from harness.records.schema import Outcome, Result
from harness.vibevoice.engine.frame_step import EagerStep, Opening, PromptPart, Row
from harness.vibevoice.process.setup import prepare
from harness.vibevoice.stages.presets import Weights

FIGURES = "audio_s_per_s", "step_ms", "p99_ms", "server_cpu_ms", "reader_cpu_ms", "chunk"
KEYS = {"ratio_sessions_32": 3.0, "ratio_sessions_1": 1.5, "model_share_32": 0.5}  # must be reached


@dataclass(frozen=True)
class Load:
    """One topology with this many streams."""

    audio_s_per_s: float
    step_ms: float
    p99_ms: float
    server_cpu_ms: float
    reader_cpu_ms: float
    chunk: float
    failed: int


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.quick:
        options.sessions, options.frames, options.rounds = [1, 4], 8, 1
    topologies = tuple(wire.TOPOLOGIES)
    loads: dict[tuple[str, int], list[Load]] = {}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(common.served(options.preset, topology=name)) for name in topologies}
        for server in servers.values():
            asyncio.run(speak(server.url, 2, 4))
        for number in range(options.rounds):
            for sessions in options.sessions:
                for name in topologies if number % 2 == 0 else topologies[::-1]:
                    common.say(f"round {number + 1} of {options.rounds}: {sessions} streams, {name}")
                    frames = options.frames * (4 if sessions <= 4 else 1)
                    loads.setdefault((name, sessions), []).append(measured(servers[name], sessions, frames))
    model = {sessions: model_ms(options.preset, sessions, options.quick) for sessions in options.sessions}
    found = figures(loads, model, options.sessions)
    common.finish(table(loads, model, options), found)
    if any(load.failed for each in loads.values() for load in each):
        return common.EXIT_FAILED
    reached = options.quick or all(found.get(key, least) >= least for key, least in KEYS.items())
    return 0 if reached else common.EXIT_FAILED


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/model/topologies.py --sessions 1,4,16,32,64 --rounds 3")
    made.add_argument("--preset", default="tiny", help="tiny, or a .json file of sizes (default: tiny)")
    made.add_argument("--sessions", type=common.several(common.whole(1, 250)), default=[1, 4, 16, 32, 64])
    made.add_argument("--frames", type=common.whole(5, 2000), default=100, help="of a stream (100; 4 times at 1 to 4)")
    made.add_argument("--rounds", type=common.whole(1, 99), default=3, help="of both in turn; medians are shown (3)")
    return made


def measured(server: TritonServer, sessions: int, frames: int) -> Load:
    """The part of the streams in which all of them speak."""
    reader, before = psutil.Process(), common.cpu_seconds(server)
    own = sum(reader.cpu_times()[:2])
    results = asyncio.run(speak(server.url, sessions, frames))
    own = sum(reader.cpu_times()[:2]) - own
    used = sum(common.cpu_seconds(server).values()) - sum(before.values())
    done = [result for result in results if result.outcome is Outcome.DONE]
    if len(done) < 1:
        raise common.HarnessError(f"no stream of {sessions} was spoken: {results[0].error}")
    from_ns = max(result.chunks.received_ns[0] for result in done)
    to_ns = min(result.chunks.received_ns[-1] for result in done)
    if to_ns <= from_ns:
        raise common.HarnessError(
            f"{sessions} streams of {frames} frames did not speak at the same time: give more --frames"
        )
    inside = sum(frames_between(result, from_ns, to_ns) for result in done)
    gaps = np.concatenate([np.diff(result.chunks.received_ns) for result in done]) / 1e6
    return Load(
        audio_s_per_s=float(inside * wire.SECONDS_PER_FRAME / (to_ns - from_ns) * 1e9),
        step_ms=float(np.median([common.frame_ms(result) for result in done])),
        p99_ms=float(np.percentile(gaps, 99)),
        server_cpu_ms=1e3 * used / (frames * len(done)),
        reader_cpu_ms=1e3 * own / (frames * len(done)),
        chunk=frames * len(done) / sum(len(result.chunks.received_ns) for result in done),
        failed=len(results) - len(done),
    )


def frames_between(result: Result, from_ns: int, to_ns: int) -> float:
    inside = (result.chunks.received_ns > from_ns) & (result.chunks.received_ns <= to_ns)
    return float(result.chunks.samples[inside].sum() / wire.SAMPLES_PER_FRAME)


async def speak(url: str, sessions: int, frames: int) -> list[Result]:
    async with SpeechClient(url) as client:
        requests = [common.request(f"stream-{number}", frames) for number in range(sessions)]
        return await asyncio.gather(*(client.speak(request, "closed") for request in requests))


def model_ms(preset: str, sessions: int, quick: bool, prompt: int = 30) -> float:
    """Median milliseconds of a step of this many sessions in this process."""
    prepare()
    step, count = EagerStep(Weights(preset), 1 << 31, 256), 5 if quick else 60
    draw = np.random.default_rng(0)
    rows = []
    for number in range(1, sessions + 1):
        step.open(number, Opening(prompt, count))
        step.read([PromptPart(number, [1] * prompt, np.empty((0, wire.LATENT_SIZE), np.float32))])
        noise = draw.standard_normal(wire.LATENT_SIZE, np.float32)
        rows.append(Row(number, noise, wire.DEFAULT_GUIDANCE_SCALE, wire.DEFAULT_DIFFUSION_STEPS))
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        step.launch(rows).values()
        taken.append(1e3 * (time.perf_counter() - began))
    return float(np.median(taken[count // 5 :]))


def median(loads: Sequence[Load], name: str) -> float:
    return float(np.median([getattr(load, name) for load in loads]))


def figures(loads: dict[tuple[str, int], list[Load]], model: dict[int, float], sessions: Sequence[int]) -> dict:
    found: dict = {}
    for count in sessions:
        both = {name: loads[name, count] for name in wire.TOPOLOGIES}
        pairs = zip(both[wire.FUSED], both[wire.STAGED], strict=True)
        found[f"ratio_sessions_{count}"] = float(np.median([a.audio_s_per_s / b.audio_s_per_s for a, b in pairs]))
        found[f"model_ms_{count}"] = model[count]
        found[f"model_share_{count}"] = model[count] / median(both[wire.FUSED], "step_ms")
        for name, each in both.items():
            for figure in FIGURES:
                found[f"{name}_{figure}_{count}"] = median(each, figure)
    return found


def table(loads: dict[tuple[str, int], list[Load]], model: dict[int, float], options) -> Table:
    columns = "audio s/s", "step ms", "p99 ms", "CPU ms a frame: server", "reader", "chunk", "model ms", "share"
    shown = common.table(f"Topologies at {options.preset}, medians of {options.rounds} rounds", "streams", *columns)
    for count in options.sessions:
        for name in wire.TOPOLOGIES:
            each = loads[name, count]
            step = median(each, "step_ms")
            own = (f"{model[count]:.2f}", f"{model[count] / step:.0%}") if name == wire.FUSED else ("", "")
            shown.add_row(f"{count} {name}", *(f"{median(each, figure):.2f}" for figure in FIGURES), *own)
    return shown


if __name__ == "__main__":
    common.run(main)
