"""Sessions of the served ensemble: admission, cancellation, leaks, and the cost of a warm start.

admission     more sessions than the KV limit allows, at once: which are served, wait, or are rejected as busy
cancellation  clients that leave: frames, or parts of a prompt, that a stage still executed for them
leak          thousands of sessions opened and dropped: memory of every server process before and after
warm          frame steps after `start_frame` compared with those of a session that really got there
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import torch
from model import free_mib, kv_limit_bytes, prompt_builder, prompt_tokens, session_bytes
from rich.table import Table

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.server import TritonServer
from harness.errors import ServerError
from harness.records.schema import Outcome, Request, Result
from harness.vibevoice.stages.configuration import preset_config
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights

ROOM_FOR = 6  # sessions that the KV limit of the admission part holds
PAST_FRAMES = 5_000  # of each of them: their memory is really written, and visible as resident
WAITING_S = 60.0
AT_ONCE = 32  # concurrent sessions in the leak part
QUIET_S = 0.15  # without a new execution, after which the counts are final
SETTLE_S = 3.0
WARM_UP = 1_024  # sessions before the first memory sample
WARM_BLOCK = 50  # steps of one session before switching to the other one
MOST_AFTER_CANCEL = 2
KV_HELD = "kv_held_after_mib"  # by sessions that have all ended
MUST_BE_NONE = ("_failed", KV_HELD)
Part = tuple[Table, dict[str, float]]


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    tables, figures = [], {}
    for name in options.only or PARTS:
        shown, found = PARTS[name](options)
        tables.append(shown)
        figures |= found
    common.finish(tables, figures)
    wrong = [name for name, value in figures.items() if name.endswith(MUST_BE_NONE) and value]
    late = figures.get("frames_after_cancel_max", 0) > MOST_AFTER_CANCEL
    return common.EXIT_FAILED if wrong or late else 0


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/model/sessions.py --only cancellation,leak --count 2000")
    made.add_argument("--only", type=common.several(part_name), help=f"parts, with commas: {', '.join(PARTS)}")
    made.add_argument("--count", type=common.whole(64, 1_000_000), help="sessions of the leak part (default: 10000)")
    made.add_argument("--leavers", type=common.whole(1, 10_000), help="clients that leave (default: 60)")
    made.add_argument("--start-frame", type=common.whole(100, 40_000), help="of the warm start (default: 20000)")
    made.add_argument("--seed", type=common.whole(0, 1 << 31), default=0, help="of who leaves when")
    made.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b or a .json file of sizes")
    return made


def part_name(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PARTS)}")
    return text


def room_bytes(preset: str, request: Request) -> int:
    """KV bytes that a request takes."""
    tokens = prompt_tokens(prompt_builder(preset_config(preset)), request)
    return session_bytes(preset, tokens, request.start_frame + request.frames)


# Admission


@dataclass
class Wave:
    """The outcomes of sessions that were all requested at once."""

    results: list[Result] = field(default_factory=list)
    peak_mib: float = 0.0  # of the LLM stage's process, above what it had before

    def served(self) -> list[Result]:
        return [one for one in self.results if one.outcome is Outcome.DONE]

    def waited(self) -> list[Result]:
        """Those whose audio started after another one had ended: all were sent at the same moment."""
        first_end = min((one.ended_ns for one in self.served()), default=0)
        return [one for one in self.served() if one.chunks.received_ns[0] > first_end]

    def busy(self) -> list[Result]:
        return [one for one in self.results if one.outcome is Outcome.ERROR and one.error.startswith(wire.BUSY)]

    def wait_s(self, results: Sequence[Result], until=lambda one: one.chunks.received_ns[0]) -> float:
        return max(((until(one) - one.sent_ns) / 1e9 for one in results), default=0.0)


def admission(options) -> Part:
    """Two waves: a queue too short for all, and a queue in which the wait is too long for some."""
    frames = 20 if options.quick else 60
    asked = common.request("a", frames, start_frame=PAST_FRAMES)
    room = room_bytes(options.preset, asked)
    limit_bytes = ROOM_FOR * room + room // 2
    waves, held = {}, 0.0
    for name, line, wait_s in (("a short line", 8, WAITING_S), ("a short wait", 64, 1.5)):
        parameters = {
            f"{wire.LLM}.kv_limit_bytes": str(limit_bytes),
            f"{wire.ENTRY}.waiting_limit": str(line),
            f"{wire.ENTRY}.waiting_seconds": str(wait_s),
        }
        with common.served(options.preset, parameters=parameters) as server:
            common.say(f"admission: 24 sessions, room for {ROOM_FOR}, {line} may wait, at most {wait_s:g} s …")
            waves[name] = asyncio.run(wave(server, asked, 24))
            held += kv_held_mib(server)
    return admission_table(waves, limit_bytes), admission_figures(waves, limit_bytes, held)


async def wave(server: TritonServer, asked: Request, count: int) -> Wave:
    found = Wave()
    async with SpeechClient(server.url) as client:
        await client.speak(common.request("warm", 5), "closed")
        before = common.memory_mib(server)[wire.LLM]
        speaking = asyncio.gather(*(client.speak(asked, "closed") for _ in range(count)))
        while not speaking.done():
            await asyncio.wait([speaking], timeout=0.1)
            memory = await asyncio.to_thread(common.memory_mib, server)
            found.peak_mib = max(found.peak_mib, memory[wire.LLM] - before)
        found.results = speaking.result()
    return found


def kv_held_mib(server: TritonServer) -> float:
    """KV cache that is still held although every session has ended."""
    time.sleep(0.5)
    return kv_limit_bytes(server) / 2**20 - free_mib(server)


def admission_table(waves: dict[str, Wave], limit_bytes: int) -> Table:
    columns = "24 at once", "served", "of them waited", "longest wait s", "busy", "longest wait s", "failed"
    title = f"Admission: a KV limit of {limit_bytes / 2**20:.1f} MiB has room for {ROOM_FOR} sessions"
    shown = common.table(title, *columns, "memory above before, MiB")
    for name, one in waves.items():
        served, waited, busy = one.served(), one.waited(), one.busy()
        waits = one.wait_s(waited), one.wait_s(busy, until=lambda each: each.ended_ns)
        counts = len(served), len(waited), f"{waits[0]:.1f}", len(busy), f"{waits[1]:.1f}", failed(one)
        shown.add_row(name, *map(str, counts), f"{one.peak_mib:.1f}")
    return shown


def failed(one: Wave) -> int:
    return len(one.results) - len(one.served()) - len(one.busy())


def admission_figures(waves: dict[str, Wave], limit_bytes: int, held: float) -> dict[str, float]:
    for words in sorted({one.error for found in waves.values() for one in found.results if one.error}):
        common.say(f"  {words}")
    return {
        "admission_served": sum(len(one.served()) for one in waves.values()),
        "admission_waited": sum(len(one.waited()) for one in waves.values()),
        "admission_busy": sum(len(one.busy()) for one in waves.values()),
        "admission_failed": sum(failed(one) for one in waves.values()),
        "admission_peak_mib": max(one.peak_mib for one in waves.values()),
        "admission_limit_mib": limit_bytes / 2**20,
        f"admission_{KV_HELD}": held,
    }


# Cancellation


def cancellation(options) -> Part:
    """One session at a time on a quiet server: what the stages executed beyond what the client had received."""
    rng = np.random.default_rng(options.seed)
    leavers = options.leavers or (6 if options.quick else 60)
    with common.served(options.preset) as server:
        common.say(f"cancellation: {leavers} clients leave in frames, {leavers // 3} while their prompt is read …")
        beyond = asyncio.run(leave_in_frames(server, [int(rng.integers(1, 60)) for _ in range(leavers)]))
        beyond["parts of a prompt"] = asyncio.run(leave_in_prompts(server, rng.uniform(0.03, 0.3, size=leavers // 3)))
        held = kv_held_mib(server)
    columns = "what", "mean", "most", "most, less the one in flight", "clients"
    shown = common.table("Executed after the client had left", *columns)
    most = {what: max(0, max(values, default=0) - 1) for what, values in beyond.items()}
    for what, values in beyond.items():
        row = f"{np.mean(values or [0]):.2f}", max(values, default=0), most[what], len(values)
        shown.add_row(what, *map(str, row))
    frames = {f"frames_after_cancel_max_{stage}": most[f"frames of {stage}"] for stage in wire.STAGES}
    parts = {"prompt_parts_after_cancel_max": most["parts of a prompt"], f"cancellation_{KV_HELD}": held}
    return shown, {"frames_after_cancel_max": max(frames.values()), **frames, **parts}


async def leave_in_frames(server: TritonServer, leave_after: Sequence[int]) -> dict[str, list[int]]:
    """Frames that each stage executed beyond those received, by leaving client; one of them was in flight."""
    beyond: dict[str, list[int]] = {f"frames of {stage}": [] for stage in wire.STAGES}
    async with SpeechClient(server.url) as client:
        await executed(server, client, 3, leave_after=0)
        whole = await executed(server, client, 5, leave_after=0)
        beside = {stage: whole[stage] - 5 for stage in wire.STAGES}  # calls other than frames
        for heard in leave_after:
            found = await executed(server, client, 5_000, heard)
            for stage in wire.STAGES:
                beyond[f"frames of {stage}"].append(found[stage] - beside[stage] - heard)
    if min(map(min, beyond.values())) < 0:
        raise ServerError("a stage counted fewer frames than were heard: something else uses this server")
    return beyond


async def executed(server: TritonServer, client: SpeechClient, frames: int, leave_after: int) -> dict[str, int]:
    """Requests that each stage served for one session; the client leaves after this many frames."""
    before = common.counts(server)
    leaving = common.leave_after(leave_after)
    result = await client.open(common.request("c", frames), "closed", on_chunk=leaving).run()
    if result.outcome is Outcome.ERROR:
        raise ServerError(f"a session failed: {result.error}")
    after = await settled(server)
    return {stage: after[stage].requests - before[stage].requests for stage in wire.STAGES}


async def settled(server: TritonServer) -> dict:
    """Triton's counts once no stage is busy."""
    last, now = None, common.counts(server)
    while now != last:
        await asyncio.sleep(QUIET_S)
        last, now = now, common.counts(server)
    return now


async def leave_in_prompts(server: TritonServer, after_s: Sequence[float]) -> list[int]:
    """Parts of a prompt that were read after the client had left, by client; one of them was in flight."""
    script, closing, beyond = "Speaker 1: " + "word " * 12_000, 1, []
    async with SpeechClient(server.url) as client:
        for wait_s in after_s:
            stream = client.open(common.request("p", 5, script), "closed")
            speaking = asyncio.create_task(stream.run())
            await asyncio.sleep(wait_s)
            at_leave = common.counts(server)[wire.LLM].requests
            stream.stop(Outcome.CANCELLED)
            result = await speaking
            read = (await settled(server))[wire.LLM].requests - at_leave - closing
            if not len(result.chunks):  # otherwise the prompt was read before it left
                beyond.append(read)
    return beyond


# Leak


def leak(options) -> Part:
    """Memory after a warm-up and after each quarter; the KV limit allows little more than the concurrent sessions."""
    count = options.count or (128 if options.quick else 10_000)
    room = room_bytes(options.preset, common.request("a", 2 * AT_ONCE))
    limit = {f"{wire.LLM}.kv_limit_bytes": str(2 * AT_ONCE * room)}
    with common.served(options.preset, parameters=limit) as server:
        rng = np.random.default_rng(options.seed)
        asyncio.run(all_at_once(server))
        asyncio.run(drop_many(server, rng, min(count, WARM_UP)))
        looks, endings = [look(server)], []
        for quarter in range(4):
            common.say(f"leak: {len(endings)} of {count} sessions, {AT_ONCE} at a time …")
            endings += asyncio.run(drop_many(server, rng, count * (quarter + 1) // 4 - len(endings)))
            looks.append(look(server))
        held = kv_held_mib(server)
    return leak_table(looks, count), leak_figures(looks, endings, held)


def look(server: TritonServer) -> dict[str, float]:
    time.sleep(SETTLE_S)
    return common.memory_mib(server)


def leak_figures(looks: Sequence[dict[str, float]], endings: Sequence[Result], held: float) -> dict[str, float]:
    wrong = [one for one in endings if one.outcome is Outcome.ERROR]
    for words in sorted({one.error for one in wrong})[:3]:
        common.say(f"  {words}")
    after = [sum(memory.values()) * 2**20 / 1e6 for memory in looks]
    return {
        "leak_mb": after[-1] - after[0],
        "leak_second_half_mb": after[-1] - after[2],
        "leak_sessions": len(endings),
        "leak_finished": sum(one.outcome is Outcome.DONE for one in endings),
        "leak_failed": len(wrong),
        f"leak_{KV_HELD}": held,
    }


async def all_at_once(server: TritonServer) -> None:
    """The largest number of concurrent sessions, so that every stage has run its largest batch."""
    async with SpeechClient(server.url) as client:
        requests = [common.request("w", 2 * AT_ONCE, seed=seed) for seed in range(AT_ONCE)]
        await asyncio.gather(*(client.speak(one, "closed") for one in requests))


async def drop_many(server: TritonServer, rng: np.random.Generator, count: int) -> list[Result]:
    """Open and drop sessions: some while the prompt is read, most in frames, some spoken to the end."""
    places = asyncio.Semaphore(AT_ONCE)
    plans = [(rng.random(), int(rng.integers(1, 6)), float(rng.uniform(0, 0.05)), seed) for seed in range(count)]

    async def one(kind: float, frames: int, wait_s: float, seed: int) -> Result:
        async with places:
            return await drop(client, kind, frames, wait_s, seed)

    async with SpeechClient(server.url) as client:
        return await asyncio.gather(*(one(*plan) for plan in plans))


async def drop(client: SpeechClient, kind: float, frames: int, wait_s: float, seed: int) -> Result:
    if kind < 0.25:
        return await client.speak(common.request("whole", frames, seed=seed), "closed")
    leaving = common.leave_after(frames)
    stream = client.open(common.request("dropped", 40, seed=seed), "closed", on_chunk=leaving)
    if kind < 0.5:  # early: before or while its prompt is read
        asyncio.get_running_loop().call_later(wait_s, stream.stop, Outcome.CANCELLED)
    return await stream.run()


def leak_table(looks: Sequence[dict[str, float]], count: int) -> Table:
    columns = "process", "after warm-up", *(f"{count * quarter // 4} sessions" for quarter in (1, 2, 3, 4)), "growth"
    shown = common.table("Memory in MiB while sessions are opened and dropped, shared pages left out", *columns)
    for name in looks[-1]:
        values = [memory.get(name, 0.0) for memory in looks]
        shown.add_row(name, *(f"{value:.1f}" for value in values), f"{values[-1] - values[0]:+.1f}")
    return shown


# Warm start


def warm(options) -> Part:
    """Steps of the LLM stage at equal context, in this process, alternating between the two sessions in blocks."""
    start = options.start_frame or (300 if options.quick else 20_000)
    blocks = 2 if options.quick else 10
    stage = LLMStage(Weights(options.preset))
    prompt = torch.arange(100, dtype=torch.int32)
    for session, past in ((1, 0), (2, start)):
        stage.open(session, len(prompt), start + blocks * WARM_BLOCK, past)
        if not past:
            stage.prefill(session, prompt, torch.empty(0, wire.LATENT_SIZE))
    common.say(f"warm start: a session takes {start} frame steps to get there …")
    began = time.monotonic()
    steps_ms(stage, 1, start)
    common.say(f"  it got there in {time.monotonic() - began:.0f} s")
    there, opened = [], []
    for _ in range(blocks):
        there += steps_ms(stage, 1, WARM_BLOCK)
        opened += steps_ms(stage, 2, WARM_BLOCK)
    got, began_ms = statistics.median(there), statistics.median(opened)
    shown = common.table(f"LLM step at frame {start}", "session", "median ms", "ratio")
    shown.add_row("that really got there", f"{got:.3f}", "1")
    shown.add_row("opened with start_frame", f"{began_ms:.3f}", f"{began_ms / got:.3f}")
    return shown, {"warm_start_ratio": began_ms / got, "step_ms_got_there": got, "step_ms_warm_start": began_ms}


def steps_ms(stage: LLMStage, session: int, count: int) -> list[float]:
    latent, semantic = torch.randn(1, wire.LATENT_SIZE), torch.randn(1, wire.SEMANTIC_SIZE)
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        stage.step([session], latent, semantic)
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


PARTS = {"admission": admission, "cancellation": cancellation, "leak": leak, "warm": warm}

if __name__ == "__main__":
    common.run(main)
