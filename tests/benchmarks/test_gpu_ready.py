"""What a GPU would run, on torch's meta device at the sizes of 1.5b: shapes, launches and syncs, without a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the package triton is not installed")
from harness import wire
from harness.vibevoice.stages.backbone import NoCache
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage
from harness.vibevoice.stages.voice_encoder import VoiceStage

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")  # as tests/vibevoice/test_ragged.py has the kernels, whichever comes first
    from harness.vibevoice.kernels import fused_rows, plain_rows, ragged

META = torch.device("meta")
BATCH = 16
CEILINGS = {wire.LLM: 550, wire.DIFFUSION: 425, wire.VOCODER: 1100}  # kernels of a frame step at 1.5b
FUSED_CEILINGS = {wire.LLM: 28 * 10 + 16, wire.DIFFUSION: 10 * (4 * 4 + 4) + 8}  # with the row-wise kernels of a GPU
ROWS = "_add_norm", "_angles", "_turn", "_gate", "_modulate", "_solve"
NO_KERNEL = """view _unsafe_view reshape permute transpose t slice split split_with_sizes narrow expand unsqueeze
    squeeze unfold unbind chunk select alias detach as_strided empty empty_like empty_strided new_empty
    lift_fresh""".split()
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")  # the host waits for their answer


class Launches(TorchDispatchMode):
    """Counts what would be kernels, and refuses what would make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        given = [each for each in args if isinstance(each, torch.Tensor)]
        if any(each.is_meta for each in given):
            to = (kwargs or {}).get("device")
            assert name not in SYNCS, f"{name} makes the host wait for the device"
            assert to is None or torch.device(to).type == "meta", f"{name} to {to} waits for the device"
            self.count += name not in NO_KERNEL
        return function(*args, **(kwargs or {}))


class Kernel:
    """Stands in for a compiled kernel: counts its launches, and keeps the variants of it that they need."""

    def __init__(self, launches):
        self.launches, self.variants = launches, set()

    def __getitem__(self, grid):
        assert all(side > 0 for side in grid)
        return self

    def __call__(self, *args, **kwargs):
        self.launches.count += 1
        types = [getattr(value, "dtype", type(value)) for value in args]
        self.variants.add((*types, *kwargs.items()))


@pytest.fixture(scope="module")
def weights():
    return Weights("1.5b", device="meta")


@pytest.fixture
def launches():
    return Launches()


@pytest.fixture(params=["plain", "fused"])
def rows(request, launches, monkeypatch):
    """What a network computes row by row: in torch's operations, and as it does on a GPU."""
    for name in ("_attend_part", "_combine"):
        monkeypatch.setattr(ragged, name, Kernel(launches))
    for name in ROWS:
        monkeypatch.setattr(fused_rows, name, Kernel(launches))
    return {"plain": plain_rows, "fused": fused_rows}[request.param]


def needed(step) -> dict[str, set]:
    """Variants of the row-wise kernels that a step needs."""
    kernels = {name: getattr(fused_rows, name) for name in ROWS}
    for kernel in kernels.values():
        kernel.variants.clear()
    step()
    return {name: set(kernel.variants) for name, kernel in kernels.items() if kernel.variants}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, device=META, dtype=dtype)


def test_an_llm_step_of_running_and_of_new_sessions_never_waits(weights, launches, rows):
    stage = LLMStage(weights, kv_limit_bytes=1 << 40)
    stage.backbone.rows = rows
    caches = [meta(28, 2, 2, 600 + row, 128, dtype=torch.bfloat16) for row in range(2 * BATCH)]
    lengths, ids = [400] * (2 * BATCH), torch.arange(-1, BATCH - 1).to(META)
    latent, semantic = (meta(BATCH, size, dtype=torch.bfloat16) for size in (wire.LATENT_SIZE, wire.SEMANTIC_SIZE))
    with launches, torch.inference_mode():
        kv = ragged.RaggedStep.of(caches, lengths)
        embeds = stage.feedback(latent, semantic, ids).repeat(2, 1)
        hidden = stage.backbone(embeds, torch.tensor(lengths).to(META), kv)
    assert hidden.shape == (2 * BATCH, 1536) and hidden.dtype == torch.bfloat16
    assert 28 * 10 < launches.count <= (CEILINGS if rows is plain_rows else FUSED_CEILINGS)[wire.LLM]


def test_a_denoised_frame_never_waits(weights, launches, rows):
    stage = DiffusionStage(weights)
    stage.head.rows = rows
    given = meta(2 * BATCH, 1536, dtype=torch.bfloat16), meta(BATCH, wire.LATENT_SIZE), meta(BATCH, 1)
    stage.compute(*given, wire.DEFAULT_DIFFUSION_STEPS)  # the timesteps are embedded once
    launches.count = 0
    with launches, torch.inference_mode():
        latent = stage.compute(*given, wire.DEFAULT_DIFFUSION_STEPS)
    assert latent.shape == (BATCH, wire.LATENT_SIZE) and latent.dtype == torch.float32
    assert 100 < launches.count <= (CEILINGS if rows is plain_rows else FUSED_CEILINGS)[wire.DIFFUSION]


def test_a_frame_of_the_vocoder_never_waits(weights, launches):
    stage = VocoderStage(weights)
    state = meta(stage.state_size, BATCH, dtype=torch.bfloat16)
    with launches, torch.inference_mode():
        audio, semantic, after = stage.compute(meta(BATCH, wire.LATENT_SIZE), state)
    shapes = audio.shape, semantic.shape, after.shape
    assert shapes == ((BATCH, wire.SAMPLES_PER_FRAME), (BATCH, wire.SEMANTIC_SIZE), state.shape)
    assert 100 < launches.count <= CEILINGS[wire.VOCODER]


@pytest.mark.parametrize("rows", ["fused"], indirect=True)
@torch.inference_mode()
def test_what_a_step_needs_is_compiled_when_a_stage_is_built(weights, rows):
    llm, diffusion = LLMStage(weights), DiffusionStage(weights)
    llm.backbone.rows = diffusion.head.rows = rows
    prompt_part = meta(70, 1536, dtype=torch.bfloat16), torch.arange(70, device=META), NoCache()
    built, step = needed(llm.backbone.warm_up), needed(lambda: llm.backbone(*prompt_part))
    assert step == built and step.keys() == {"_add_norm", "_angles", "_turn", "_gate"}
    given = [meta(BATCH, *each.sizes) for each in diffusion.graph_inputs()]
    built, step = needed(diffusion._warm_up), needed(lambda: diffusion._graphed(*given, wire.DEFAULT_DIFFUSION_STEPS))
    assert step == built and step.keys() == {"_gate", "_modulate", "_solve"}


def test_a_prompt_part_never_waits(weights, launches, rows):
    stage = LLMStage(weights, kv_limit_bytes=1 << 40)
    stage.backbone.rows = rows
    stage.open(1, prompt_tokens=300, frames=10)
    voice = weights.config.audio_token_id
    with launches:
        for part in (torch.tensor([5] * 40 + [voice] * 20), torch.tensor([7] * 240)):  # the first, and one after it
            stage.prefill(1, part, torch.zeros(int((part == voice).sum()), wire.LATENT_SIZE))
    assert stage.sessions.get(1).with_prompt.length == 300 and launches.count > 0


def test_a_voice_is_encoded_without_a_wait(weights, launches):
    stage = VoiceStage(weights)
    with launches, torch.inference_mode():
        frames = stage.compute(meta(3 * wire.SAMPLES_PER_FRAME))
    assert frames.shape == (3, wire.LATENT_SIZE) and launches.count > 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
    ],
)
def test_what_would_wait_is_found(wait, launches):
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), launches:
        wait(meta(4, 4))
