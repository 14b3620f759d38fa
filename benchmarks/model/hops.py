"""Where the time of a frame step goes in Triton: compute, queueing and hops, for several numbers of streams.

compute  what Triton counts as a stage's compute: the model, and passing tensors to the stage's process and back
alone    the model itself: the same stage object in one process, at that batch size, with nothing beside it
queue    the wait for a batch: the stage's delay, and earlier executions
hops     the rest of the step: the entry between two calls of the ensemble, and the ensemble between its stages
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import psutil
import torch

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.server import TritonServer
from harness.deploy.statistics import difference
from harness.errors import ServerError
from harness.records.schema import Outcome, StageStatistics
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage

WARM_FRAMES = 20
MOST_FRAMES = 20_000  # a stream speaks until the last window is over, or for this long
ALONE_STEPS = 100  # the median counts, after a tenth as many for warm-up
ALONE_CONTEXT = 400
CLIENT = "this client"


@dataclass(frozen=True)
class Part:
    """One stage in one frame step, as one request sees it."""

    compute_ms: float
    queue_ms: float
    batch: float


@dataclass(frozen=True)
class Window:
    """Means over one window, times in ms per frame step; ``cpu_ms`` is CPU time per frame by process."""

    step_ms: float
    parts: dict[str, Part]
    cpu_ms: dict[str, float]

    @property
    def compute_ms(self) -> float:
        return sum(part.compute_ms for part in self.parts.values())

    @property
    def queue_ms(self) -> float:
        return sum(part.queue_ms for part in self.parts.values())

    @property
    def hops_ms(self) -> float:
        return self.step_ms - self.compute_ms - self.queue_ms


Measured = dict[int, list[Window]]  # by number of streams
Alone = dict[int, dict[str, float]]  # ms of each stage, by number of streams


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    streams = options.streams or ([1, 4] if options.quick else [1, 4, 16, 32])
    windows = options.windows or (1 if options.quick else 3)
    seconds = options.seconds or (1.0 if options.quick else 6.0)
    knobs = {f"{stage}.delay_us": options.delay_us for stage in wire.STAGES}
    measured: Measured = {}
    with common.served(options.preset, knobs=knobs) as server:
        for count in streams:
            common.say(f"{count} streams: {windows} windows of {seconds:g} s …")
            measured[count] = asyncio.run(hold(server, count, windows, seconds, options.chunk_frames))
    common.say("the stages alone …")
    alone = stages_alone(Weights(options.preset), measured)
    common.finish(
        [steps_table(measured, alone), stages_table(measured, alone), cpu_table(measured)], figures(measured, alone)
    )
    return 0


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/model/hops.py --streams 1,16 --seconds 10")
    made.add_argument("--streams", type=common.several(common.whole(1, 200)), help="default: 1,4,16,32")
    made.add_argument("--windows", type=common.whole(1, 99), help="windows for each; their median counts (default: 3)")
    made.add_argument("--seconds", type=common.real(0.5, 600), help="length of a window (default: 6)")
    made.add_argument("--chunk-frames", type=common.whole(1, 100), default=1, help="frames in one response")
    made.add_argument("--delay-us", type=common.whole(0, 10_000_000), default=0, help="queue delay of every stage")
    made.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b or a .json file of sizes")
    return made


async def hold(server: TritonServer, count: int, windows: int, seconds: float, chunk_frames: int) -> list[Window]:
    """``count`` streams speak at once; the windows begin when all of them do."""
    async with SpeechClient(server.url) as client:
        heard = [0] * count
        streams = [
            client.open(
                common.request(f"{i}", MOST_FRAMES, seed=i, chunk_frames=chunk_frames),
                "closed",
                on_chunk=counter(heard, i),
            )
            for i in range(count)
        ]
        tasks = [asyncio.create_task(stream.run()) for stream in streams]
        try:
            await until_all_speak(tasks, heard)
            return [await window(server, count, seconds) for _ in range(windows)]
        finally:
            for stream in streams:
                stream.stop(Outcome.CANCELLED)
            await asyncio.gather(*tasks, return_exceptions=True)


def counter(heard: list[int], i: int) -> Callable:
    def count(stream, at_ns: int, samples: int) -> None:
        heard[i] += samples // wire.SAMPLES_PER_FRAME

    return count


async def until_all_speak(tasks: Sequence[asyncio.Task], heard: Sequence[int]) -> None:
    while min(heard) < WARM_FRAMES:
        await asyncio.sleep(0.05)
        ended = next((task.result() for task in tasks if task.done()), None)
        if ended:
            raise ServerError(f"a stream ended before the windows began: {ended.error or ended.outcome}")


async def window(server: TritonServer, count: int, seconds: float) -> Window:
    before_s, before, cpu_before = await asyncio.to_thread(read, server)
    await asyncio.sleep(seconds)
    after_s, after, cpu_after = await asyncio.to_thread(read, server)
    stages = {stage.stage: stage for stage in difference(after.values(), before.values())}
    frames = max(1, stages[wire.DIFFUSION].requests)
    return Window(
        step_ms=1e3 * count * (after_s - before_s) / frames,
        parts={stage: part(stages[stage]) for stage in wire.STAGES},
        cpu_ms={name: 1e3 * (cpu_s - cpu_before.get(name, 0.0)) / frames for name, cpu_s in cpu_after.items()},
    )


def read(server: TritonServer) -> tuple[float, dict[str, StageStatistics], dict[str, float]]:
    """Time, Triton's counts, and CPU seconds by process."""
    cpu_s = {**common.cpu_seconds(server), CLIENT: sum(psutil.Process().cpu_times()[:2])}
    counts = common.counts(server)
    return time.monotonic(), counts, cpu_s


def part(stage: StageStatistics) -> Part:
    requests = max(1, stage.requests)
    return Part(stage.compute_ns / requests / 1e6, stage.queue_ns / requests / 1e6, requests / max(1, stage.executions))


def stages_alone(weights: Weights, measured: Measured) -> Alone:
    """Median ms of one step of each stage object at the observed batch size, in this process."""
    torch.set_num_threads(1)
    stages = LLMStage(weights), DiffusionStage(weights), VocoderStage(weights)
    batches = {
        n: {s: max(1, round(median(w, lambda x, s=s: x.parts[s].batch))) for s in wire.STAGES}
        for n, w in measured.items()
    }
    return {
        count: dict(zip(wire.STAGES, alone_ms(stages, *sizes.values()), strict=True))
        for count, sizes in batches.items()
    }


def alone_ms(stages: tuple, llm_batch: int, diffusion_batch: int, vocoder_batch: int) -> Sequence[float]:
    llm, diffusion, vocoder = stages
    for session in range(max(llm_batch, vocoder_batch)):
        llm.open(session, 1, ALONE_CONTEXT + ALONE_STEPS, ALONE_CONTEXT)
        llm.prefill(session, torch.zeros(1, dtype=torch.int32), torch.empty(0, wire.LATENT_SIZE))
        vocoder.open(session)
    latent, semantic = torch.zeros(64, wire.LATENT_SIZE), torch.zeros(64, wire.SEMANTIC_SIZE)
    condition, n = torch.zeros(diffusion_batch, 2, llm.config.text_config.hidden_size), diffusion_batch
    frames = torch.zeros(vocoder_batch, dtype=torch.int32)
    steps = (
        lambda: llm.step(list(range(llm_batch)), latent[:llm_batch], semantic[:llm_batch]),
        lambda: diffusion.denoise(condition, latent[:n], torch.ones(n, 1), [wire.DEFAULT_DIFFUSION_STEPS] * n),
        lambda: vocoder.step(list(range(vocoder_batch)), latent[:vocoder_batch], frames),
    )
    return [statistics.median([timed_ms(step) for _ in range(ALONE_STEPS)][ALONE_STEPS // 10 :]) for step in steps]


def timed_ms(step: Callable) -> float:
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def median(windows: Sequence[Window], figure: Callable[[Window], float]) -> float:
    return statistics.median(figure(window) for window in windows)


def shares(windows: Sequence[Window]) -> dict[str, float]:
    return {
        "compute": median(windows, lambda w: w.compute_ms / w.step_ms),
        "queue": median(windows, lambda w: w.queue_ms / w.step_ms),
        "hops": median(windows, lambda w: w.hops_ms / w.step_ms),
    }


def steps_table(measured: Measured, alone: Alone):
    columns = (
        "streams",
        "step ms",
        "lowest to highest",
        "compute",
        "of it alone",
        "queue",
        "hops",
        "frames/s",
        "x real time",
    )
    shown = common.table("A frame step, and its parts", *columns)
    for count, windows in measured.items():
        step, share = median(windows, lambda w: w.step_ms), shares(windows)
        spread = f"{min(w.step_ms for w in windows):.2f} to {max(w.step_ms for w in windows):.2f}"
        cells = share["compute"], sum(alone[count].values()) / step, share["queue"], share["hops"]
        speed = f"{1e3 * count / step:.0f}", f"{1e3 * wire.SECONDS_PER_FRAME / step:.1f}"
        shown.add_row(str(count), f"{step:.2f}", spread, *(f"{cell:.0%}" for cell in cells), *speed)
    return shown


def stages_table(measured: Measured, alone: Alone):
    columns = "streams", "stage", "compute ms", "of it alone ms", "queue ms", "mean batch", "share of the step"
    shown = common.table("Each stage, as one request sees it", *columns)
    for count, windows in measured.items():
        for stage in wire.STAGES:
            compute, queue, batch, share = (
                median(windows, figure)
                for figure in (
                    lambda w, s=stage: w.parts[s].compute_ms,
                    lambda w, s=stage: w.parts[s].queue_ms,
                    lambda w, s=stage: w.parts[s].batch,
                    lambda w, s=stage: (w.parts[s].compute_ms + w.parts[s].queue_ms) / w.step_ms,
                )
            )
            values = f"{compute:.2f}", f"{alone[count][stage]:.2f}", f"{queue:.2f}", f"{batch:.2f}", f"{share:.0%}"
            shown.add_row(str(count), stage, *values)
    return shown


def cpu_table(measured: Measured):
    names = list(next(iter(measured.values()))[0].cpu_ms)
    shown = common.table("Processor time per frame, ms", "process", *(f"{count} streams" for count in measured))
    cpu = {n: [median(windows, lambda w, n=n: w.cpu_ms.get(n, 0.0)) for windows in measured.values()] for n in names}
    for name, values in {**cpu, "all": [sum(column) for column in zip(*cpu.values(), strict=True)]}.items():
        shown.add_row(name, *(f"{value:.2f}" for value in values))
    return shown


def figures(measured: Measured, alone: Alone) -> dict[str, float]:
    found = {}
    for count, windows in measured.items():
        step = median(windows, lambda w: w.step_ms)
        found |= {f"step_ms_{count}": step}
        found |= {f"{name}_share_{count}": share for name, share in shares(windows).items()}
        found |= {
            f"alone_share_{count}": sum(alone[count].values()) / step,
            f"mean_batch_{count}": median(windows, lambda w: w.parts[wire.DIFFUSION].batch),
            f"cpu_ms_per_frame_{count}": median(windows, lambda w: sum(w.cpu_ms.values())),
        }
    return found


if __name__ == "__main__":
    common.run(main)
