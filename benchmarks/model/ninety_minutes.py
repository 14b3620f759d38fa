"""A 90-minute session with four speakers through Triton beside short ones: time, gaps, drift and memory.

With --prefill instead: how long speaking sessions wait while a long prompt is read, in parts and whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
from model import free_mib, prompt_builder, prompt_tokens

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.server import TritonServer
from harness.errors import InputError, ServerError
from harness.records.schema import Outcome, Request, Result
from harness.traffic.mix import ScriptSource
from harness.traffic.script import count_speakers, format_script, parse_script, validate_utf8
from harness.vibevoice.entry.prompt import PromptBuilder
from harness.vibevoice.stages.configuration import preset_config

SAMPLE_S = 5.0
SHORT_S = (4.0, 16.0)  # seconds of audio
SPEAKING = 4  # sessions that speak while a prompt is read
SETTLE_S = 3.0
EVERYONE = "\n".join(f"Speaker {n}: I am number {n}." for n in (1, 2, 3, 4))
WHOLE = 1_000_000  # tokens of a part: more than any prompt has
WARM_FRAMES = 20
SENT_MIB = 1000 * wire.SAMPLES_PER_FRAME * 4 / 2**20  # of audio in 1000 frames, float32
MOST_FRAMES = 20_000  # a speaking session continues until the last prompt is read, or for this long


@dataclass
class Memory:
    """Samples of the server's memory over one run: MiB by process, and frames of the long session until then."""

    frames: list[int] = field(default_factory=list)
    mib: list[dict[str, float]] = field(default_factory=list)
    free_kv_mib: list[float] = field(default_factory=list)

    def take(self, server: TritonServer, frames: int) -> None:
        self.frames.append(frames)
        self.mib.append(common.memory_mib(server))
        self.free_kv_mib.append(free_mib(server))

    def growth(self) -> dict[str, float]:
        """MiB per 1000 frames by process: the slope of a line through the samples after the first tenth."""
        first = next((i for i, frames in enumerate(self.frames) if frames >= 0.1 * self.frames[-1]), 0)
        x = np.array(self.frames[first:]) / 1000
        if len(x) < 2 or x[-1] == x[0]:
            return dict.fromkeys(self.mib[-1], float("nan"))
        return {name: np.polyfit(x, [one[name] for one in self.mib[first:]], 1)[0] for name in self.mib[-1]}


@dataclass(frozen=True)
class Ninety:
    """The result of one run; ``left_over_mib`` is memory after the session minus before it, by process."""

    long: Result
    short: list[Result]
    memory: Memory
    left_over_mib: dict[str, float]
    free_kv_after_mib: float


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    return prefill(options) if options.prefill else ninety(options)


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/model/ninety_minutes.py --frames 4050 --beside 2")
    made.add_argument("--frames", type=common.whole(20, wire.MAX_FRAMES), help="default: 40500, 90 minutes")
    made.add_argument("--beside", type=common.whole(0, 64), default=2, help="users with short sessions beside it")
    made.add_argument("--minutes", type=common.real(0.1, 600), default=60.0, help="stop after this long (default: 60)")
    made.add_argument("--pause", type=common.real(0, 600), help="mean seconds between a user's sessions (default: 10)")
    made.add_argument("--script", type=Path, help="a file of 'Speaker N: text' lines; left out = a generated one")
    made.add_argument("--chunk-frames", type=common.whole(1, 100), default=1, help="frames in one response")
    made.add_argument(
        "--prefill", action="store_true", help="measure the gaps that a long prompt causes in other streams"
    )
    made.add_argument("--prompt-tokens", type=common.whole(100, 60_000), help="of --prefill (default: 25000)")
    made.add_argument("--repeats", type=common.whole(1, 20), help="prompts of --prefill (default: 3)")
    made.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b or a .json file of sizes")
    return made


def ninety(options) -> int:
    frames = options.frames or (150 if options.quick else wire.MAX_FRAMES)
    prompts = prompt_builder(preset_config(options.preset))
    script, voices = script_of(options.script, prompts, frames)
    asked = common.request("long", frames, script, voices, chunk_frames=options.chunk_frames, seed=1)
    tokens = prompt_tokens(prompts, asked)
    common.say(f"{frames} frames, {len(script.split())} words, {tokens} prompt tokens, {len(voices)} voices")
    with common.served(options.preset) as server:
        pause_s = (0.0 if options.quick else 10.0) if options.pause is None else options.pause
        run = asyncio.run(speak_beside(server, asked, options.beside, pause_s, 60 * options.minutes))
    return report(run)


def script_of(path: Path | None, prompts: PromptBuilder, frames: int) -> tuple[str, tuple[int, ...]]:
    """A script as long as its audio, with four speakers, that fits the context; or that of a file."""
    if path:
        return script_file(path)
    for shorter in np.linspace(1.0, 0.1, 19):
        script, speakers = ScriptSource().script(np.random.default_rng(1), int(frames * shorter), wire.MAX_SPEAKERS)
        voices = tuple(range(1, speakers + 1))
        needed = len(prompts.prompt(parse_script(script), voices).token_ids) + frames + 1
        if needed <= prompts.context:
            return script, voices
    raise InputError(f"no script fits {frames} frames into a context of {prompts.context}: ask for fewer --frames")


def script_file(path: Path) -> tuple[str, tuple[int, ...]]:
    try:
        turns = parse_script(validate_utf8(path.read_bytes()))
    except OSError as error:
        raise InputError(f"--script {path} cannot be read: {error.strerror}") from error
    return format_script(turns), tuple(range(1, count_speakers(turns) + 1))


async def speak_beside(server: TritonServer, asked: Request, users: int, pause_s: float, limit_s: float) -> Ninety:
    """The long session with short ones beside it; memory is sampled until it ends."""
    heard, memory, short = [0], Memory(), []
    async with SpeechClient(server.url) as client:
        await client.speak(common.request("warm", 30, EVERYONE, (1, 2, 3, 4)), "closed")
        before = common.memory_mib(server)
        stream = client.open(asked, "closed", on_chunk=lambda _, at_ns, samples: counted(heard, samples))
        speaking = asyncio.create_task(stream.run())
        others = [asyncio.create_task(short_ones(client, user, pause_s, short)) for user in range(users)]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await watch(server, speaking, heard, memory, asked.frames)
        finally:
            stream.stop(Outcome.CANCELLED)
            for other in others:
                other.cancel()
            await asyncio.gather(speaking, *others, return_exceptions=True)
        await asyncio.sleep(SETTLE_S)
    after = common.memory_mib(server)
    left_over = {name: after[name] - before.get(name, 0.0) for name in after}
    return Ninety(speaking.result(), short, memory, left_over, free_mib(server))


def counted(heard: list[int], samples: int) -> None:
    heard[0] += samples // wire.SAMPLES_PER_FRAME


async def short_ones(client: SpeechClient, user: int, pause_s: float, results: list[Result]) -> None:
    """A user in a closed loop: one short session after another, with pauses (exponential), until cancelled."""
    rng = np.random.default_rng(100 + user)
    while True:
        frames = round(rng.uniform(*SHORT_S) * wire.FRAMES_PER_SECOND)
        script, speakers = ScriptSource().script(rng, frames, int(rng.integers(1, wire.MAX_SPEAKERS + 1)))
        voices = tuple(int(voice) for voice in rng.integers(0, 5, size=speakers))
        asked = common.request(f"{user}", frames, script, voices, seed=int(rng.integers(1 << 31)))
        results.append(await client.speak(asked, "closed"))
        await asyncio.sleep(rng.exponential(pause_s))


async def watch(server: TritonServer, speaking: asyncio.Task, heard: list[int], memory: Memory, frames: int) -> None:
    """Sample the memory and print progress until the long session has ended."""
    began = first = None
    while not speaking.done():
        await asyncio.wait([speaking], timeout=SAMPLE_S if heard[0] > 0.02 * frames else 0.5)
        if not heard[0]:
            continue
        began, first = (began, first) if began else (time.monotonic(), heard[0])
        await asyncio.to_thread(memory.take, server, heard[0])
        rate = (heard[0] - first) / max(1e-9, time.monotonic() - began)
        left = f"{(frames - heard[0]) / rate / 60:.1f} min left" if rate else "…"
        common.say(f"{heard[0]} of {frames} frames, {sum(memory.mib[-1].values()):.0f} MiB, {left}")


def report(run: Ninety) -> int:
    result, chunks = run.long, run.long.chunks
    spoken = int(chunks.samples.sum()) // wire.SAMPLES_PER_FRAME
    if len(chunks) < 2:
        raise ServerError(f"the long session gave no audio: {result.error or result.outcome}")
    growth, seconds = run.memory.growth(), (result.ended_ns - result.sent_ns) / 1e9
    first, last = tenths_ms(result)
    failed = [one for one in run.short if one.outcome is not Outcome.DONE]
    figures = {
        "frames": spoken,
        "frames_asked": result.frames,
        "wall_s": seconds,
        "first_audio_s": (chunks.received_ns[0] - result.sent_ns) / 1e9,
        "real_time_factor": span_s(result) / ((spoken - 1) * wire.SECONDS_PER_FRAME),
        "longest_gap_ms": longest_gap_ms([result]),
        "longest_gap_short_ms": longest_gap_ms(run.short),
        "frame_ms_first_tenth": first,
        "frame_ms_last_tenth": last,
        "short_done": len(run.short) - len(failed),
        "short_failed": len(failed),
        "memory_growth_mb_per_1000_frames": sum(growth.values()) * 2**20 / 1e6,
        "memory_growth_tritonserver_mb_per_1000_frames": growth[common.SERVER] * 2**20 / 1e6,
        "memory_growth_rest_mb_per_1000_frames": (sum(growth.values()) - growth[common.SERVER]) * 2**20 / 1e6,
        "free_kv_mb_lowest": min(run.memory.free_kv_mib) * 2**20 / 1e6,
        "free_kv_mb_after": run.free_kv_after_mib * 2**20 / 1e6,
        "memory_left_over_mb": sum(run.left_over_mib.values()) * 2**20 / 1e6,
    }
    shown = common.table("One long session", "what", "figure")
    for name, value in figures.items():
        shown.add_row(name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else str(value))
    common.finish([shown, memory_table(run, growth)], figures)
    for one in [result, *failed]:
        if one.outcome is not Outcome.DONE:
            common.say(f"{one.request_id}: {one.outcome} {one.error}")
    return 0 if spoken == result.frames and not failed else common.EXIT_FAILED


def memory_table(run: Ninety, growth: dict[str, float]):
    columns = "process", "first MiB", "last MiB", "MiB per 1000 frames", "after it ended, against before"
    shown = common.table("Memory while it spoke, shared pages left out", *columns)
    first, last = run.memory.mib[0], run.memory.mib[-1]
    for name in last:
        row = first.get(name, 0.0), last[name], growth[name], run.left_over_mib.get(name, 0.0)
        shown.add_row(name, *(f"{value:.1f}" for value in row[:2]), f"{row[2]:.3f}", f"{row[3]:+.1f}")
    shown.caption = (
        f"tritonserver (2.51) keeps every response of a stream until the stream ends: {SENT_MIB:.1f} MiB of audio per "
        "1000 frames. Later versions bound that with --grpc-max-response-pool-size."
    )
    shown.caption_justify = "left"
    return shown


def tenths_ms(result: Result) -> tuple[float, float]:
    """Mean time of a frame in the first and in the last tenth of the chunks, ms."""
    received, frames = result.chunks.received_ns, result.chunks.samples / wire.SAMPLES_PER_FRAME
    tenth = max(1, (len(received) - 1) // 10)
    first = (received[tenth] - received[0]) / frames[1 : tenth + 1].sum()
    return first / 1e6, (received[-1] - received[-1 - tenth]) / frames[-tenth:].sum() / 1e6


def span_s(result: Result) -> float:
    return (result.chunks.received_ns[-1] - result.chunks.received_ns[0]) / 1e9


def longest_gap_ms(results: Sequence[Result], start_ns: int = 0, end_ns: int = 1 << 62) -> float:
    """The longest time between two chunks of one session, of the gaps that touch a window."""
    gaps = [0.0]
    for received in (result.chunks.received_ns for result in results):
        touching = (received[1:] > start_ns) & (received[:-1] < end_ns)
        gaps += (np.diff(received)[touching] / 1e6).tolist()
    return max(gaps)


def prefill(options) -> int:
    tokens = options.prompt_tokens or (2_000 if options.quick else 25_000)
    repeats = options.repeats or (1 if options.quick else 3)
    prompts = prompt_builder(preset_config(options.preset))
    script = script_of_tokens(prompts, tokens)
    measured = {}
    for name, part in (("in parts", ""), ("whole", str(WHOLE))):
        parameters = {f"{wire.ENTRY}.prefill_tokens": part} if part else {}
        with common.served(options.preset, parameters=parameters) as server:
            common.say(f"a prompt of {tokens} tokens {name}, {repeats} times …")
            measured[name] = asyncio.run(gaps(server, script, repeats))
    return report_prefill(measured, tokens)


def script_of_tokens(prompts: PromptBuilder, tokens: int) -> str:
    """A script whose whole prompt has at least this many tokens, and hardly more."""
    frames = tokens
    while True:
        script, _ = ScriptSource().script(np.random.default_rng(2), frames, 1)
        made = len(prompts.prompt(parse_script(script), (0,)).token_ids)
        if made >= tokens:
            return script
        frames = int(frames * max(1.01, tokens / made))


@dataclass(frozen=True)
class Gaps:
    """The longest gap of the speaking sessions in each window, ms: with a prompt coming in, and without."""

    prompt_ms: list[float]
    quiet_ms: list[float]
    prompt_s: list[float]


async def gaps(server: TritonServer, script: str, repeats: int) -> Gaps:
    """Sessions speak throughout; a prompt is read, followed by an equally long time without one."""
    windows: list[tuple[int, int, int]] = []  # prompt sent, its first frame, end of the quiet time
    async with SpeechClient(server.url) as client:
        heard = [[0] for _ in range(SPEAKING)]
        streams = [
            client.open(
                common.request(f"{i}", MOST_FRAMES, seed=i),
                "closed",
                on_chunk=lambda _, at, n, one=one: counted(one, n),
            )
            for i, one in enumerate(heard)
        ]
        tasks = [asyncio.create_task(stream.run()) for stream in streams]
        try:
            while min(heard)[0] < WARM_FRAMES and not any(task.done() for task in tasks):
                await asyncio.sleep(0.05)
            for _ in range(repeats):
                windows.append(await one_prompt(client, script))
        finally:
            for stream in streams:
                stream.stop(Outcome.CANCELLED)
            results = await asyncio.gather(*tasks)
    if lost := [one for one in results if one.outcome is not Outcome.CANCELLED]:
        raise ServerError(f"a speaking session ended: {lost[0].error or lost[0].outcome}")
    return Gaps(
        [longest_gap_ms(results, sent, came) for sent, came, _ in windows],
        [longest_gap_ms(results, came, end) for _, came, end in windows],
        [(came - sent) / 1e9 for sent, came, _ in windows],
    )


async def one_prompt(client: SpeechClient, script: str) -> tuple[int, int, int]:
    result = await client.speak(common.request("prompt", 1, script), "closed")
    if result.outcome is not Outcome.DONE:
        raise ServerError(f"the long prompt failed: {result.error or result.outcome}")
    await asyncio.sleep((result.ended_ns - result.sent_ns) / 1e9)
    return result.sent_ns, result.ended_ns, time.monotonic_ns()


def report_prefill(measured: dict[str, Gaps], tokens: int) -> int:
    columns = "prompt", "prefill s", "longest gap ms", "median of repeats ms", "without a prompt ms"
    shown = common.table(f"{SPEAKING} sessions speak while {tokens} prompt tokens come in", *columns)
    for name, found in measured.items():
        figures = max(found.prompt_ms), float(np.median(found.prompt_ms)), max(found.quiet_ms)
        shown.add_row(name, f"{np.median(found.prompt_s):.1f}", *(f"{value:.0f}" for value in figures))
    parts, whole = measured["in parts"], measured["whole"]
    figures = {
        "gap_ms_in_parts": max(parts.prompt_ms),
        "gap_ms_whole": max(whole.prompt_ms),
        "gap_ms_without_prompt": max(parts.quiet_ms),
        "prefill_s_in_parts": np.median(parts.prompt_s),
        "prefill_s_whole": np.median(whole.prompt_s),
        "prompt_tokens": tokens,
    }
    common.finish(shown, figures)
    return 0


if __name__ == "__main__":
    common.run(main)
