"""Measures every stage over batch and context, and prints the results as JSON lines; run as a module by a parent.

Events, in order: a DeviceEvent, a PointEvent for each point, an EndEvent; or, at any time, an ErrorEvent. See
``harness.device_profile``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from harness import gpu_memory, wire
from harness.device_profile import (
    PREFILL,
    DeviceEvent,
    EndEvent,
    ErrorEvent,
    ModelSizes,
    PointEvent,
    ProfilerEvent,
    SkippedPoint,
    StagePoint,
    event_line,
)
from harness.errors import HarnessError, InputError
from harness.vibevoice.process.setup import prepare
from harness.vibevoice.profiling.device_time import DeviceTimer
from harness.vibevoice.profiling.roofline import Cost, Roofline
from harness.vibevoice.profiling.sampling import Sampler, spread
from harness.vibevoice.sessions.table import NoRoom
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage
from harness.vibevoice.stages.voice_encoder import VoiceStage

STEPS_AT_ONCE = 32  # of sessions opened for one point: contexts grow meanwhile, so they start lower
MEMORY_SHARE = 0.85  # of what is free after the weights, for KV caches
TIMED_SHARE = 0.75  # of a point's seconds; the rest is for separating device time from host time
SPEED_POINTS = 3  # used by ``device_speed``
LEAST_SECONDS = 0.01  # for separation at a needed point, even if the budget is used up: one call

Call = Callable[[], object]


@dataclass(frozen=True)
class Grid:
    """The points to measure. Contexts are positions of a session's two branches together."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (100, 400, 7_600, 32_000, 63_000)
    prefill_tokens: tuple[int, ...] = (64, 256, 1024, 4096)
    prefill_contexts: tuple[int, ...] = (0, 7_600, 32_000)
    steps: tuple[int, ...] = (5, 20)  # besides the default number, at one batch size
    steps_batch: int = 8
    voice_seconds: tuple[int, ...] = (3, 10, 30)

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Grid:
        if quick:
            return cls((1, 4, 16), (100, 7_600), (64, 256), (0,), (20,), 4, (3,))
        return cls() if device.type == "cuda" else cls(prefill_contexts=(0, 7_600))

    def points(self, longest: int) -> dict[str, list[dict]]:
        """The coordinates of every point by stage; ``longest`` is the context of one branch."""
        contexts = [c for c in self.contexts if c <= 2 * longest]
        prefills = itertools.product(self.prefill_tokens, self.prefill_contexts)
        steps = [(batch, wire.DEFAULT_DIFFUSION_STEPS) for batch in self.batches]
        steps += [(self.steps_batch, count) for count in self.steps]
        return {
            wire.LLM: [{"batch": b, "context": c} for b, c in itertools.product(self.batches, contexts)],
            PREFILL: [{"tokens": t, "context": c} for t, c in prefills if t + c <= longest],
            wire.DIFFUSION: [{"batch": b, "steps": s} for b, s in steps],
            wire.VOCODER: [{"batch": b} for b in self.batches],
            wire.VOICE: [{"seconds": s} for s in self.voice_seconds],
        }


class LLMBench:
    """Frame steps and prompt parts of the real LLM stage, with contexts of uninitialised contents."""

    def __init__(self, weights: Weights, roofline: Roofline):
        self.room_bytes = _kv_room(weights.device, roofline)
        self.stage, self.roofline = LLMStage(weights, self.room_bytes), roofline

    def step(self, batch: int, context: int) -> tuple[Iterator[Call], Cost]:
        return self._steps(batch, context), self.roofline.step(batch, context)

    def prefill(self, tokens: int, context: int) -> tuple[Iterator[Call], Cost]:
        return self._prefills(tokens, context), self.roofline.prefill(tokens, context)

    def _steps(self, batch: int, context: int) -> Iterator[Call]:
        spoken = (context - STEPS_AT_ONCE) // 2  # in both branches: on average over the steps they hold ``context``
        sessions = list(range(batch))
        latent, semantic = torch.randn(batch, wire.LATENT_SIZE), torch.randn(batch, wire.SEMANTIC_SIZE)
        step = lambda: self.stage.step(sessions, latent, semantic)  # noqa: E731
        while True:
            try:
                for session in sessions:
                    self.stage.open(session, 1, spoken + STEPS_AT_ONCE + 1, spoken)
                    self.stage.prefill(session, torch.zeros(1, dtype=torch.long), torch.empty(0, wire.LATENT_SIZE))
                step()  # feeds "speech begin"
                yield from itertools.repeat(step, STEPS_AT_ONCE)
            finally:
                self._close(sessions)

    def _prefills(self, tokens: int, context: int) -> Iterator[Call]:
        parts = max(1, context // (8 * tokens))  # timed in a row: the context drifts by at most an eighth
        start = max(0, context - (parts - 1) * tokens // 2)
        while True:
            try:
                self.stage.open(0, start + parts * tokens, 1)
                self.stage.sessions.get(0).with_prompt.fill(start)  # cost depends on shapes, not contents
                yield from itertools.repeat(lambda: self._add(tokens), parts)
            finally:
                self._close([0])

    def _add(self, tokens: int) -> None:
        self.stage.prefill(0, torch.zeros(tokens, dtype=torch.long), torch.empty(0, wire.LATENT_SIZE))

    def _close(self, sessions: list[int]) -> None:
        for session in sessions:
            self.stage.close(session)


class DiffusionBench:
    """The real diffusion stage, including copies to and from the device."""

    def __init__(self, weights: Weights, roofline: Roofline):
        self.stage, self.roofline = DiffusionStage(weights), roofline
        self.hidden = weights.config.text_config.hidden_size

    def denoise(self, batch: int, steps: int) -> tuple[Iterator[Call], Cost]:
        condition, noise = torch.randn(batch, 2, self.hidden), torch.randn(batch, wire.LATENT_SIZE)
        guidance = torch.full((batch, 1), wire.DEFAULT_GUIDANCE_SCALE)
        call = lambda: self.stage.denoise(condition, noise, guidance, [steps] * batch)  # noqa: E731
        return itertools.repeat(call), self.roofline.denoise(batch, steps)


class VocoderBench:
    """The real vocoder stage, including copies to and from the device."""

    def __init__(self, weights: Weights, roofline: Roofline):
        self.stage, self.roofline = VocoderStage(weights), roofline

    def vocode(self, batch: int) -> tuple[Iterator[Call], Cost]:
        return self._steps(batch), self.roofline.vocode(batch, self.stage.state_size)

    def _steps(self, batch: int) -> Iterator[Call]:
        sessions, latent = list(range(batch)), torch.randn(batch, wire.LATENT_SIZE)
        token = torch.full((batch,), wire.TOKEN_SPEECH_FRAME)
        try:
            for session in sessions:
                self.stage.open(session)
            yield from itertools.repeat(lambda: self.stage.step(sessions, latent, token))
        finally:
            for session in sessions:
                self.stage.close(session)


class VoiceBench:
    """The real voice encoder."""

    def __init__(self, weights: Weights, roofline: Roofline):
        self.stage, self.roofline = VoiceStage(weights), roofline

    def encode(self, seconds: int) -> tuple[Iterator[Call], Cost]:
        waveform = 0.1 * torch.randn(seconds * wire.SAMPLE_RATE_HZ)
        frames = math.ceil(len(waveform) / wire.SAMPLES_PER_FRAME)
        return itertools.repeat(lambda: self.stage.encode(waveform)), self.roofline.encode(frames)


BENCHES = {
    LLMBench: {wire.LLM: LLMBench.step, PREFILL: LLMBench.prefill},
    DiffusionBench: {wire.DIFFUSION: DiffusionBench.denoise},
    VocoderBench: {wire.VOCODER: VocoderBench.vocode},
    VoiceBench: {wire.VOICE: VoiceBench.encode},
}


class Profiler:
    """Measures all stages of one model on one device; ``say`` receives every event."""

    def __init__(self, weights: Weights, budget_s: float, quick: bool, say: Callable[[ProfilerEvent], None]):
        self.weights, self.say = weights, say
        self.roofline = Roofline(weights.config, weights.dtype.itemsize)
        self.points = Grid.of(weights.device, quick).points(weights.config.text_config.max_position_embeddings)
        self.count = sum(map(len, self.points.values()))
        self.device_timer = DeviceTimer.of(weights.device)
        self.pace = math.inf  # the lowest ratio of ms to the roofline among this stage's points so far
        timed_share = TIMED_SHARE if weights.device.type == "cuda" else 1.0
        self.sampler = Sampler(budget_s, self.count + SPEED_POINTS, synchronise(weights.device), timed_share)

    def run(self) -> None:
        """Report what the device can do, then every point, then the sizes that an emulation needs."""
        sizes: dict[str, int] = {}
        self.speed = self._measured_speed()
        done = itertools.count(1)
        for bench_type, methods in BENCHES.items():
            bench = bench_type(self.weights, self.roofline)
            for stage, method in methods.items():
                self.sampler.stage(len(self.points[stage]))
                self.pace = math.inf
                for number, at in enumerate(self.points[stage]):
                    # every stage gets a time; what is left out for lack of time can be extrapolated from the first
                    # point
                    point = self._measured(method, bench, at, needed=not number)
                    self.say(PointEvent(stage=stage, point=point, done=next(done), of=self.count))
            if bench_type is LLMBench:
                sizes["kv_room_bytes"] = served_room(self.weights, bench.room_bytes)
            if bench_type is VocoderBench:
                sizes["state_values"] = bench.stage.state_size
            del bench  # frees its weights for the next bench
            free(self.weights.device)
        hidden_size = self.weights.config.text_config.hidden_size
        model = ModelSizes(hidden_size=hidden_size, kv_bytes_per_token=self.roofline.kv_bytes_per_token, **sizes)
        self.say(EndEvent(model=model))

    def _measured(
        self, method: Callable, bench: object, at: dict[str, int], needed: bool = False
    ) -> StagePoint | SkippedPoint:
        try:
            calls, cost = method(bench, **at)
            calls = iter(calls)
            floor_ms = cost.floor_ms(**self.speed)
            taken = self.sampler.sample(calls, needed, floor_ms * self.pace if math.isfinite(self.pace) else 0.0)
            parts = {} if taken is None else self._parts(calls, float(np.median(taken)), needed)
        except (torch.OutOfMemoryError, MemoryError, NoRoom):
            return SkippedPoint(**at, left_out="out of memory")
        finally:
            calls = None  # closes what the point opened
            free(self.weights.device)
        if taken is None:
            return SkippedPoint(**at, left_out="no time left")
        times = {"ms": float(np.median(taken)), "spread": spread(taken), "roofline_ms": floor_ms}
        self.pace = min(self.pace, times["ms"] / floor_ms)
        counts = {"samples": len(taken), "bytes": int(cost.bytes), "gflop": cost.operations / 1e9}
        return StagePoint(**at, **{name: _rounded(value) for name, value in times.items()}, **parts, **counts)

    def _parts(self, calls: Iterator[Call], ms: float, needed: bool) -> dict:
        seconds = max(self.sampler.seconds_beside(), LEAST_SECONDS if needed else 0.0)
        parts = self.device_timer.split(calls, ms, seconds)
        return {name: _rounded(value) if isinstance(value, float) else value for name, value in parts.items()}

    def _measured_speed(self) -> dict[str, float]:
        self.sampler.stage(SPEED_POINTS)
        speed, noise = device_speed(self.weights, self.sampler)
        self.say(DeviceEvent(**_device_facts(self.weights), **speed, self_noise=noise))
        return speed


def device_speed(weights: Weights, sampler: Sampler) -> tuple[dict[str, float], dict[str, float]]:
    """Copy bandwidth (read + write) and matrix product throughput in the stages' type, and their spread.

    The fastest call counts: others can only have been slowed down.
    """
    size, side = (2 << 30, 8192) if weights.device.type == "cuda" else (128 << 20, 768)
    copies, products = _steady(sampler, _copy(weights, size)), _steady(sampler, _product(weights, side))
    speed = {
        "bandwidth_gb_s": 2 * size / float(copies.min()) / 1e6,
        "tflop_s": 2 * side**3 / float(products.min()) / 1e9,
    }
    noise = {
        "empty_call_ms": float(np.median(_steady(sampler, lambda: None))),
        "same_product_p90_over_median": float(np.percentile(products, 90) / np.median(products)),
        "load_average": os.getloadavg()[0],
    }
    return speed, noise


def _copy(weights: Weights, size: int) -> Call:
    source = torch.empty(size, dtype=torch.uint8, device=weights.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(weights: Weights, side: int) -> Call:
    square = torch.randn(side, side, device=weights.device, dtype=weights.dtype)
    return lambda: square @ square


def _steady(sampler: Sampler, call: Call) -> np.ndarray:
    return sampler.sample(itertools.repeat(call, 50), needed=True)


def synchronise(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has finished all queued work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _device_facts(weights: Weights) -> dict:
    on_gpu = weights.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(weights.device) if on_gpu else "cpu",
        "dtype": str(weights.dtype).removeprefix("torch."),
    }


def _kv_room(device: torch.device, roofline: Roofline) -> int:
    """Bytes available here for KV caches beside the weights of all stages, in a process alone on the device."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return max(0, int(MEMORY_SHARE * (free - roofline.weight_bytes)))


def settle() -> None:
    """Exempt the current objects, modules above all, from every later ``free``: scanning them takes half a second."""
    gc.collect()
    gc.freeze()


def served_room(weights: Weights, room_bytes: int) -> int:
    """Bytes of KV cache that a server of all stages grants on this device; without a GPU: what a profile may use."""
    if weights.device.type != "cuda":
        return room_bytes
    total = torch.cuda.mem_get_info(weights.device)[1]
    numbers = sum(weights.parameters().values())
    return gpu_memory.gpu_room(total, numbers * weights.dtype.itemsize, 1, weights.graph_batch)


def free(device: torch.device) -> None:
    """Free unreferenced objects, and cached memory of the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def chosen_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device that torch can use: give --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _say(event: ProfilerEvent) -> None:
    print(event_line(event), flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--weights-seed", type=int, default=0)
    parser.add_argument("--budget-seconds", type=float, default=420.0)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args(arguments)
    prepare()
    try:
        weights = Weights(asked.preset, asked.weights_seed, asked.checkpoint, chosen_device(asked.device))
        profiler = Profiler(weights, asked.budget_seconds, asked.quick, _say)
        settle()
        profiler.run()
    except HarnessError as error:
        _say(ErrorEvent(message=str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
