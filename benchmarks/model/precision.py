"""Fidelity of the stages in bfloat16 and float16 against float32, teacher-forced at early and late positions.

The float32 stages speak some frames after a prompt of each length. The others get the same inputs at every stage and
frame (latents, features, conditions and noise of the float32 stages), so that an error is that of one stage and one
frame, not of a loop that drifts. Errors are |x - reference| / |reference| over all frames of a position; token
agreement is the share of frames whose most likely token of the four is the same. Weights are random unless a checkpoint
is given.

Positions are compared one after another, the shortest first, each in every dtype: an early end leaves complete rows.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from common import EXIT_FAILED, Parser, finish, run, say, several, table, whole

from harness import wire
from harness.vibevoice.process.setup import prepare
from harness.vibevoice.profiling.roofline import Roofline
from harness.vibevoice.stages.configuration import preset_config
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import DTYPES, Weights
from harness.vibevoice.stages.vocoder import VocoderStage

REFERENCE = "float32"
POSITIONS = (400, 1_500, 8_000, 63_000)
OUTPUTS = ("condition", "latent", "audio", "features")
PROMPT_PART = 1024


@dataclass
class Frame:
    """Inputs and outputs of one frame of the reference: all in float32 on the CPU, one row."""

    latent_before: torch.Tensor
    semantic_before: torch.Tensor
    noise: torch.Tensor
    condition: torch.Tensor
    latent: torch.Tensor
    audio: torch.Tensor
    features: torch.Tensor
    token: int


@dataclass
class Differences:
    """Sums over the frames of one position: squared differences and squares of the reference, tokens that agree."""

    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OUTPUTS, 0.0))
    sizes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OUTPUTS, 0.0))
    agreed: int = 0
    frames: int = 0

    def add(self, mine: Frame, reference: Frame) -> None:
        for name in OUTPUTS:
            one, other = getattr(mine, name).double(), getattr(reference, name).double()
            self.squares[name] += float((one - other).square().sum())
            self.sizes[name] += float(other.square().sum())
        self.agreed += mine.token == reference.token
        self.frames += 1

    def figures(self) -> dict[str, float]:
        errors = {f"{name}_error": (self.squares[name] / self.sizes[name]) ** 0.5 for name in OUTPUTS}
        return {**errors, "token_agreement": self.agreed / self.frames}


class Speaker:
    """The stages of one model in one dtype, and one session in them."""

    def __init__(self, weights: Weights, kv_bytes: int):
        self.llm, self.diffusion, self.vocoder = (
            LLMStage(weights, kv_bytes),
            DiffusionStage(weights),
            VocoderStage(weights),
        )

    def open(self, prompt: torch.Tensor, frames: int) -> None:
        self.llm.open(0, len(prompt), frames)
        for part in prompt.split(PROMPT_PART):
            self.llm.prefill(0, part, torch.empty(0, wire.LATENT_SIZE))
        self.vocoder.open(0)

    def close(self) -> None:
        self.llm.close(0)
        self.vocoder.close(0)

    def lead(self, frames: int, generator: torch.Generator) -> Iterator[Frame]:
        """Speak frames, each fed the previous one."""
        latent, semantic = torch.zeros(1, wire.LATENT_SIZE), torch.zeros(1, wire.SEMANTIC_SIZE)
        for _ in range(frames):
            noise = torch.randn(1, wire.LATENT_SIZE, generator=generator)
            frame = self._frame(latent, semantic, noise, None)
            yield frame
            latent, semantic = frame.latent, frame.features

    def follow(self, reference: Frame) -> Frame:
        """The same frame, each stage fed the reference's inputs."""
        return self._frame(reference.latent_before, reference.semantic_before, reference.noise, reference)

    def _frame(self, latent_before, semantic_before, noise, given: Frame | None) -> Frame:
        condition, said = self.llm.step([0], latent_before, semantic_before)
        guidance = torch.full((1, 1), wire.DEFAULT_GUIDANCE_SCALE)
        fed = given.condition if given else condition
        latent = self.diffusion.denoise(fed, noise, guidance, [wire.DEFAULT_DIFFUSION_STEPS])
        audio, features = self.vocoder.step([0], given.latent if given else latent, said)
        token = int((condition[:, 0] @ self.llm.legal_rows.cpu().T).argmax())
        return Frame(latent_before, semantic_before, noise, condition, latent, audio, features, token)


class Speakers:
    """One speaker per dtype, built on first use; ``make(dtype) -> Weights``.

    Where ``together`` is False, only one of them is in memory at a time, and is rebuilt when needed again.
    """

    def __init__(self, make: Callable[[str], Weights], positions: int, together: bool):
        self._make, self._positions, self._together = make, positions, together
        self._built: dict[str, Speaker] = {}

    def of(self, dtype: str) -> Speaker:
        if dtype not in self._built:
            if not self._together:
                self._built.clear()
            self._built[dtype] = _speaker(self._make(dtype), self._positions)
        return self._built[dtype]


def compare(
    make: Callable[[str], Weights],
    dtypes: Sequence[str],
    positions: Sequence[int],
    frames: int,
    seed: int,
    together: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[dict]:
    """One finding per position, from the shortest, and dtype. ``together``: all models are kept in memory."""
    began_s = clock()
    generator = torch.Generator().manual_seed(seed)
    speakers = Speakers(make, max(positions) + 3 * frames + 8, together)
    for position in sorted(positions):
        prompt = torch.randint(0, 4000, (position - 1,), generator=generator)
        spoken = _spoken(speakers, prompt, frames, generator)
        say(f"[{clock() - began_s:3.0f} s] {REFERENCE}: position {position} spoken")
        for dtype in dtypes:
            figures = _compared(speakers, dtype, prompt, spoken)
            say(f"[{clock() - began_s:3.0f} s] {dtype}: position {position} compared")
            yield {"dtype": dtype, "position": position, "frames": frames, **figures}


# ``compare`` holds no reference to a speaker, which would stay in memory beside the next one


def _spoken(speakers: Speakers, prompt: torch.Tensor, frames: int, generator: torch.Generator) -> list[Frame]:
    with _session(speakers, REFERENCE, prompt, frames) as speaker:
        return list(speaker.lead(frames, generator))


def _compared(speakers: Speakers, dtype: str, prompt: torch.Tensor, spoken: list[Frame]) -> dict[str, float]:
    found = Differences()
    with _session(speakers, dtype, prompt, len(spoken)) as speaker:
        for frame in spoken:
            found.add(speaker.follow(frame), frame)
    return found.figures()


@contextlib.contextmanager
def _session(speakers: Speakers, dtype: str, prompt: torch.Tensor, frames: int) -> Iterator[Speaker]:
    speaker = speakers.of(dtype)
    speaker.open(prompt, frames)
    try:
        yield speaker
    finally:
        speaker.close()


def _speaker(weights: Weights, positions: int) -> Speaker:
    text = weights.config.text_config
    per_token = 8 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    return Speaker(weights, positions * per_token)


def fit_together(preset: str, checkpoint: str, dtypes: Sequence[str], free_bytes: int) -> bool:
    """Whether the models in float32 and these dtypes fit in half of the free memory; the rest is for caches.

    False for a checkpoint, whose sizes are unknown before it is read.
    """
    if checkpoint:
        return False
    sizes = [DTYPES[dtype].itemsize for dtype in {REFERENCE, *dtypes}]
    return 2 * Roofline(preset_config(preset), 1).weight_bytes * sum(sizes) <= free_bytes


def _free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        __doc__, "python benchmarks/model/precision.py --preset tiny --positions 400,1500 --dtypes bfloat16"
    )
    parser.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b, or a .json file of sizes")
    parser.add_argument("--checkpoint", default="", help="a checkpoint folder instead of random weights")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="of the stages compared")
    parser.add_argument(
        "--reference-device", default="same", choices=("same", "cpu"), help="of the float32 stages (default: the same)"
    )
    parser.add_argument("--dtypes", default="bfloat16,float16", type=several(str), help="of " + ", ".join(DTYPES))
    parser.add_argument("--positions", default=list(POSITIONS), type=several(whole(2, 65_000)), help="prompt lengths")
    parser.add_argument("--frames", default=16, type=whole(1, 1000), help="frames compared at each position")
    parser.add_argument("--most", default=0.05, type=float, help="exit with 1 above this error of the condition")
    parser.add_argument("--seed", default=0, type=whole(0, 10**6))
    parser.add_argument("--out", type=Path, help="a JSON file for the findings, written as they come")
    given = parser.parse_args(arguments)
    for dtype in given.dtypes:
        if dtype not in DTYPES:
            parser.error(f"--dtypes: {dtype!r} is none of {', '.join(DTYPES)}")
    positions, frames = ([64, 400], 4) if given.quick else (given.positions, given.frames)
    device = given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    def weights(dtype: str) -> Weights:
        on = "cpu" if dtype == REFERENCE and given.reference_device == "cpu" else device
        return Weights(given.preset, given.seed, given.checkpoint, on, dtype == REFERENCE, dtype=dtype, drawn_on=device)

    prepare()
    about = {"preset": given.preset, "device": _name(device), "reference_device": given.reference_device}
    findings = []
    together = fit_together(given.preset, given.checkpoint, given.dtypes, _free_bytes(device))
    for finding in compare(weights, given.dtypes, positions, frames, given.seed, together):
        findings.append(finding)
        if given.out:
            _write(given.out, {**about, "findings": findings})
    figures = {**about, **_worst(findings), "findings": findings}
    finish(_table(about, findings), figures)
    return 0 if figures["condition_error_max"] <= given.most else EXIT_FAILED


def _worst(findings: list[dict]) -> dict[str, float]:
    errors = {f"{name}_error_max": max(each[f"{name}_error"] for each in findings) for name in OUTPUTS}
    return {**errors, "token_agreement": min(each["token_agreement"] for each in findings)}


def _table(about: dict, findings: list[dict]):
    title = "Relative error against float32, {preset} on {device}".format(**about)
    shown = table(title, "dtype", "position", *OUTPUTS, "tokens agree")
    for each in findings:
        errors = (f"{100 * each[f'{name}_error']:.2f}%" for name in OUTPUTS)
        shown.add_row(each["dtype"], str(each["position"]), *errors, f"{100 * each['token_agreement']:.1f}%")
    return shown


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _write(path: Path, content: dict) -> None:
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(path)


if __name__ == "__main__":
    run(main)
