"""Counts what a step of each stage would do on a GPU, on torch's meta device: kernels, operations, activations.

``python -m harness.vibevoice.counts`` writes the counts of the presets to harness/cards/models.json, from
which ``harness.cards`` estimates times without torch. Nothing is computed and no GPU is needed.

An activation is a tensor that the step itself makes. Its bytes count each time that a kernel reads or writes it:
an upper bound for what passes through the GPU's memory, because a part stays in its caches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from harness import wire
from harness.vibevoice.engine.graph_step import GraphStep
from harness.vibevoice.kernels import cuda_graphs, fused_rows, plain_rows, ragged
from harness.vibevoice.profiling.roofline import Roofline
from harness.vibevoice.stages import fused_towers
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.towers import Tower
from harness.vibevoice.stages.vocoder import VocoderStage
from harness.vibevoice.stages.voice_encoder import VoiceStage

FILE = Path(__file__).resolve().parents[1] / "cards" / "models.json"
PRESETS = ("tiny", "1.5b", "7b")
PLAIN, FUSED_ROWS = "plain", "fused rows"
PREFILL = "prefill"
BATCHES = 8, 64  # sessions at which activations are counted: they are a line in between and beyond
TOKENS = 64, 256  # of a prompt part
FRAMES = 10, 100  # of a voice sample
LENGTH = 400  # positions of each branch
NO_KERNEL = frozenset(
    """view _unsafe_view reshape permute transpose t slice split split_with_sizes narrow expand unsqueeze squeeze
    unfold unbind chunk select alias detach as_strided empty empty_like empty_strided new_empty lift_fresh""".split()
)
_PARTS = "backbone", "connectors", "head", "decoder", "semantic_encoder", "acoustic_encoder", "embeddings", "legal_rows"
_META = torch.device("meta")


class StepCount(TorchDispatchMode):
    """Counts the kernels of a step, and the bytes of activations that they read and write."""

    def __init__(self):
        super().__init__()
        self.launches, self.activation_bytes = 0, 0
        self._made: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage gets the same number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(result)
        known = {_number(each) for each in given}
        for each in made:
            if _number(each) not in known:
                self._made[_number(each)] = each.untyped_storage()
        if function.overloadpacket.__name__ not in NO_KERNEL:
            self.launched([*given, *made])
        return result

    def launched(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note a kernel that reads or writes these tensors."""
        tensors = [each for each in tensors if each.is_meta]
        if tensors:
            self.launches += 1
            self.activation_bytes += sum(_bytes(each) for each in tensors if _number(each) in self._made)


class _CountedKernel:
    """Stands in for a Triton kernel, whose launches it notes."""

    def __init__(self, count: StepCount):
        self.count = count

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self.count.launched(_tensors((args, kwargs)))


def counted(step: Callable[[], object]) -> StepCount:
    """Count one call of a step on the meta device."""
    count = StepCount()
    with _kernels_counted(count), count, torch.inference_mode():
        step()
    return count


@contextmanager
def _kernels_counted(count: StepCount) -> Iterator[None]:
    before = [
        (module, name, value)
        for module in (ragged, fused_rows, fused_towers)
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, _CountedKernel(count))
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _tensors(values: object) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _number(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's different elements: an expanded dimension repeats one."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


class StageCounts:
    """The steps of the stages of a preset on the meta device, in the type that a GPU has (bfloat16)."""

    def __init__(self, preset: str):
        self.weights = Weights(preset, device="meta")

    def of(self, variant: str) -> dict[str, dict]:
        """Launches, and a line of activation bytes over rows, of every stage, with plain or fused row-wise kernels."""
        rows = plain_rows if variant == PLAIN else fused_rows
        llm, diffusion = LLMStage(self.weights, 1 << 40), DiffusionStage(self.weights)
        llm.backbone.rows = diffusion.head.rows = rows
        llm.flash = True  # as on a GPU from Ampere on
        return {
            wire.LLM: _line(BATCHES, lambda n: lambda: _llm_step(llm, n)),
            PREFILL: _line(TOKENS, lambda n: _prompt_part(llm, n)),
            wire.DIFFUSION: _line(BATCHES, lambda n: _denoising(diffusion, n)),
            wire.VOCODER: _line(BATCHES, lambda n: _vocoding(VocoderStage(self.weights), n)),
            wire.VOICE: _line(FRAMES, lambda n: _encoding(VoiceStage(self.weights), n)),
        }

    def of_fused(self) -> dict[str, dict]:
        """As ``of``, of the fused engine's step; what joins its parts counts as the vocoder's."""
        step = GraphStep(self.weights, 1 << 40, 2 * BATCHES[-1])
        step.llm.backbone.rows = step.diffusion.head.rows = fused_rows
        step.llm.flash = True
        decoder, encoder = Tower(self.weights.acoustic_decoder()), Tower(self.weights.semantic_encoder())
        step.decoder = fused_towers.FusedTower(decoder)
        step.encoder = fused_towers.FusedTower(encoder, decoder.state_size)
        whole = _line(BATCHES, lambda n: lambda: _engine_step(step, n))
        found = {
            wire.LLM: _line(BATCHES, lambda n: lambda: _llm_step(step.llm, n)),
            PREFILL: _line(TOKENS, lambda n: lambda: _engine_prompt(step, n)),
            wire.DIFFUSION: _line(BATCHES, lambda n: _denoising(step.diffusion, n)),
        }
        others = found[wire.LLM], found[wire.DIFFUSION]
        found[wire.VOCODER] = {name: whole[name] - sum(each[name] for each in others) for name in whole}
        found[wire.VOICE] = _line(FRAMES, lambda n: _encoding(VoiceStage(self.weights), n))
        return found


def _line(rows: tuple[int, int], build: Callable[[int], Callable[[], object]]) -> dict[str, int]:
    """Launches at the larger number of rows, and activation bytes as fixed + each x rows."""
    steps = [build(count) for count in rows]
    few, many = (counted(step) for step in steps)
    each = (many.activation_bytes - few.activation_bytes) / (rows[1] - rows[0])
    fixed = max(0, round(few.activation_bytes - each * rows[0]))
    return {"launches": many.launches, "activations_fixed": fixed, "activations_each": round(each)}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device=_META, dtype=dtype)


def _llm_step(stage: LLMStage, sessions: int) -> object:
    given = _meta(sessions, wire.LATENT_SIZE), _meta(sessions, wire.SEMANTIC_SIZE)
    whole = {"dtype": torch.int64}
    ids, facts = _meta(sessions, **whole), _meta(sessions, 2, 3, **whole)
    return stage.compute(*given, ids, facts, ragged.parts_of([LENGTH]))


def _prompt_part(stage: LLMStage, tokens: int) -> Callable[[], object]:
    session, ids = tokens, torch.full((tokens,), 5)
    stage.open(session, prompt_tokens=tokens, frames=1)
    return lambda: stage.prefill(session, ids, torch.zeros(0, wire.LATENT_SIZE))


def _denoising(stage: DiffusionStage, sessions: int) -> Callable[[], object]:
    given = _meta(2 * sessions, stage.head.conditions, dtype=stage.dtype), _meta(sessions, wire.LATENT_SIZE)
    step = lambda: stage.compute(*given, _meta(sessions, 1), wire.DEFAULT_DIFFUSION_STEPS)  # noqa: E731
    counted(step)  # the timesteps are embedded once
    return step


def _vocoding(stage: VocoderStage, sessions: int) -> Callable[[], object]:
    state = _meta(stage.state_size, sessions, dtype=stage.dtype)
    return lambda: stage.compute(_meta(sessions, wire.LATENT_SIZE), state)


def _encoding(stage: VoiceStage, frames: int) -> Callable[[], object]:
    return lambda: stage.compute(_meta(frames * wire.SAMPLES_PER_FRAME))


def _engine_step(step: GraphStep, sessions: int) -> object:
    facts, numbers = _meta(sessions, 10, dtype=torch.int64), _meta(sessions, wire.LATENT_SIZE + 1)
    return step.compute(facts, numbers, ragged.parts_of([LENGTH]), wire.DEFAULT_DIFFUSION_STEPS)


def _engine_prompt(step: GraphStep, tokens: int) -> object:
    facts, voices = _meta(tokens, 4, dtype=torch.int64), _meta(tokens, wire.LATENT_SIZE)
    return step.compute_prompt(facts, voices, ragged.parts_of([LENGTH]))


def counts_of(preset: str) -> dict:
    """The counts of a preset, as harness.cards.costs reads them."""
    counts = StageCounts(preset)
    weights, itemsize = counts.weights, counts.weights.dtype.itemsize
    roofline, text = Roofline(weights.config, itemsize), weights.config.text_config
    return {
        "preset": preset,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "itemsize": itemsize,
        "hidden_size": text.hidden_size,
        "most_positions": text.max_position_embeddings,
        "kv_bytes_per_token": roofline.kv_bytes_per_token,
        "state_values": VocoderStage(weights).state_size,
        "attention_operations": roofline.attention_operations,
        "parts": {name: asdict(getattr(roofline, name)) for name in _PARTS},
        "parameters": weights.parameters(),
        "graph_batches": list(cuda_graphs.BATCHES),
        "steps": {
            PLAIN: counts.of(PLAIN),
            wire.STAGED: counts.of(FUSED_ROWS),
            wire.FUSED: counts.of_fused(),
        },
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    out = parser.parse_args(arguments).out
    models = {preset: counts_of(preset) for preset in PRESETS}
    out.write_text(json.dumps({"made_by": "python -m harness.vibevoice.counts", "models": models}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
