"""Compute time of one frame step: the stages together, without Triton, compared with transformers' ``generate``.

Same weights, one thread, one process, alternating: medians of several rounds of both. ``generate`` is a static batch
from an equal prompt, its cost per step the difference of a long and a short call. The floor is the time that this
thread would need for the step's operations at the throughput of one large matrix product (see
harness.vibevoice.profiling.roofline).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from common import Parser, finish, run, several, table, whole
from reference import full_model
from transformers import LogitsProcessor, LogitsProcessorList

from harness import wire
from harness.vibevoice.process.setup import prepare
from harness.vibevoice.profiling.roofline import Roofline
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage

STAGES = ("llm", "diffusion", "vocoder")
_WARM_STEPS = 5


class Stages:
    """The three stages of a model in this process."""

    def __init__(self, weights: Weights):
        self.llm, self.diffusion, self.vocoder = LLMStage(weights), DiffusionStage(weights), VocoderStage(weights)

    def step_ms(self, sessions: int, prompt_tokens: int, frames: int) -> np.ndarray:
        """Median milliseconds of each stage over ``frames`` steps of this many sessions in one batch."""
        ids = list(range(sessions))
        self._open(ids, prompt_tokens, frames + _WARM_STEPS)
        feedback = torch.zeros(sessions, wire.LATENT_SIZE), torch.zeros(sessions, wire.SEMANTIC_SIZE)
        taken = []
        for _ in range(frames + _WARM_STEPS):
            times, feedback = self._step(ids, *feedback)
            taken.append(times)
        for session in ids:
            self.llm.close(session)
            self.vocoder.close(session)
        return 1e3 * np.median(taken[_WARM_STEPS:], axis=0)

    def _open(self, ids: list[int], prompt_tokens: int, frames: int) -> None:
        for session in ids:
            self.llm.open(session, prompt_tokens, frames)
            self.llm.prefill(session, prompt(1, prompt_tokens)[0], torch.empty(0, wire.LATENT_SIZE))
            self.vocoder.open(session)

    def _step(self, ids: list[int], latent: torch.Tensor, semantic: torch.Tensor):
        noise = torch.randn(len(ids), wire.LATENT_SIZE)
        guidance = torch.full((len(ids), 1), wire.DEFAULT_GUIDANCE_SCALE)
        began = time.perf_counter()
        condition, token = self.llm.step(ids, latent, semantic)
        after_llm = time.perf_counter()
        latent = self.diffusion.denoise(condition, noise, guidance, [wire.DEFAULT_DIFFUSION_STEPS] * len(ids))
        after_diffusion = time.perf_counter()
        _, semantic = self.vocoder.step(ids, latent, token)
        ended = time.perf_counter()
        return (after_llm - began, after_diffusion - after_llm, ended - after_diffusion), (latent, semantic)


class Generate:
    """``generate`` forced to speak frames, with its own noise and its own cache."""

    def __init__(self, weights: Weights):
        self.model = full_model(weights)
        frames_only = LogitsProcessorList([_Only(weights.config.audio_token_id)])
        self.model._get_logits_processor = lambda *_, **__: frames_only

    def step_ms(self, sessions: int, prompt_tokens: int, frames: int) -> float:
        """Milliseconds of one more frame of a static batch."""
        short, long = (self._call_s(sessions, prompt_tokens, count) for count in (2, 2 + frames))
        return 1e3 * (long - short) / frames

    def _call_s(self, sessions: int, prompt_tokens: int, frames: int) -> float:
        begin = torch.full((sessions, 1), self.model.config.audio_bos_token_id)
        ids = torch.cat([prompt(sessions, prompt_tokens), begin], dim=1)
        began = time.perf_counter()
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=frames,
            guidance_scale=wire.DEFAULT_GUIDANCE_SCALE,
            do_sample=False,
        )
        return time.perf_counter() - began


class _Only(LogitsProcessor):
    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token_id] = 0
        return forced


def prompt(sessions: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, 4000, (sessions, tokens), generator=generator)


def thread_gflop_s() -> float:
    """Throughput of one large float32 matrix product on this thread, in GFLOP/s."""
    square = torch.randn(1024, 1024)
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        square @ square
        taken.append(time.perf_counter() - began)
    return 2 * 1024**3 / np.median(taken) / 1e9


def step_gflop(roofline: Roofline, sessions: int, context: int, state_size: int) -> float:
    costs = (
        roofline.step(sessions, context),
        roofline.denoise(sessions, wire.DEFAULT_DIFFUSION_STEPS),
        roofline.vocode(sessions, state_size),
    )
    return sum(cost.operations for cost in costs) / 1e9


def parser() -> Parser:
    made = Parser(__doc__, "python benchmarks/model/stage_speed.py --sessions 1,4,16,32")
    made.add_argument("--preset", default="tiny", help="tiny, or a .json file of sizes (default: tiny)")
    made.add_argument("--sessions", type=several(whole(1, 256)), default=[1, 16], help="batches (default: 1,16)")
    made.add_argument("--frames", type=whole(5, 2000), default=40, help="frames in a round (default: 40)")
    made.add_argument("--prompt", type=whole(1, 20_000), default=64, help="prompt tokens (default: 64)")
    made.add_argument("--rounds", type=whole(1, 99), default=5, help="rounds of both in turn (default: 5)")
    made.add_argument("--plain", action="store_true", help="the stages on torch's own operations, nothing compiled")
    return made


def main(arguments: Sequence[str]) -> None:
    given = parser().parse_args(arguments)
    if given.quick:
        given.sessions, given.frames, given.rounds = [1], 5, 1
    prepare()
    weights = Weights(given.preset, plain=given.plain)
    stages, generate, roofline = Stages(weights), Generate(weights), Roofline(weights.config, weights.dtype.itemsize)
    gflop_s = thread_gflop_s()
    shown = table(
        f"Milliseconds of a frame step at {given.preset}, one thread ({gflop_s:.0f} GFLOP/s)",
        *("sessions", *STAGES, "together", "generate", "ratio", "floor", "together / floor"),
    )
    figures: dict = {"preset": given.preset, "thread_gflop_s": gflop_s}
    for sessions in given.sessions:
        rounds = [
            (
                stages.step_ms(sessions, given.prompt, given.frames),
                generate.step_ms(sessions, given.prompt, given.frames),
            )
            for _ in range(given.rounds)
        ]
        by_stage = np.median([ours for ours, _ in rounds], axis=0)
        theirs = float(np.median([one for _, one in rounds]))
        ratio = float(np.median([one / ours.sum() for ours, one in rounds]))
        context = given.prompt + 2 * (given.frames // 2)  # of both branches, in the middle of a round
        floor = 1e3 * step_gflop(roofline, sessions, context, stages.vocoder.state_size) / gflop_s
        together = float(by_stage.sum())
        cells = (*by_stage, together, theirs, ratio, floor, together / floor)
        shown.add_row(str(sessions), *(f"{cell:.2f}" for cell in cells))
        figures |= {f"{stage}_ms_{sessions}": ms for stage, ms in zip(STAGES, by_stage, strict=True)}
        figures |= {f"generate_ms_{sessions}": theirs, f"floor_ms_{sessions}": floor}
        figures |= {f"step_ms_{sessions}": together, f"ratio_sessions_{sessions}": ratio}
    finish(shown, figures)


if __name__ == "__main__":
    run(main)
