"""Stages whose steps are CUDA graphs answer as those without; on a CPU, a graph is played by the step itself."""

import pytest
import torch
from conftest import HAS_GPU

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
from harness import wire
from harness.errors import ServerError
from harness.vibevoice.kernels import cuda_graphs
from harness.vibevoice.kernels.cuda_graphs import Graphs, Input, Recorded
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "" if HAS_GPU else "1")
    from harness.vibevoice.kernels import ragged

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # float32: batches of other sizes are summed in another order


class Played:
    """What a CUDA graph does, without one: the same step over the same tensors, its outputs where they were."""

    def __init__(self, step):
        self.step, self.outputs = step, step()

    def replay(self):
        for output, new in zip(self.outputs, self.step(), strict=True):
            output.copy_(new)


@pytest.fixture(autouse=True)
def graphs_anywhere(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "" if HAS_GPU else "1")
    if not HAS_GPU:
        monkeypatch.setattr(cuda_graphs, "record", lambda step, memory: Recorded(p := Played(step), p.outputs))


@pytest.fixture(scope="module")
def weights():
    return Weights("tiny", plain=True, device=str(DEVICE), dtype="float32")


def graphed(stage, compute, largest=8, variants=(0,)):
    stage.graphs = Graphs(compute, stage.graph_inputs(), DEVICE, largest, variants)
    return stage


def test_each_batch_takes_the_next_larger_graph_and_the_rest_is_filled_up():
    rows = []

    def compute(x, y, variant):
        rows.append((len(x), variant))
        return x + y[:, None], y.clone()

    both = Input((2,)), Input((), torch.int64, torch.tensor(7))
    made = Graphs(compute, both, DEVICE, largest=8, variants=(1, 4))
    assert made.batches == [1, 2, 4, 8] and {size for size, _ in rows} == {1, 2, 4, 8}
    for count, variant in ((3, 0), (8, 4), (1, 2)):
        x, y = torch.randn(count, 2), torch.arange(count)
        total, same = made(x, y, variant=variant)
        assert torch.equal(total.cpu(), x + y[:, None]) and torch.equal(same.cpu(), y)
    made(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64))
    whole = made._recorded[8, 1].outputs[1]
    assert whole.tolist() == [0] * 5 + [7] * 3
    assert made(torch.zeros(9, 2), torch.zeros(9, dtype=torch.int64)) is None
    assert made(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), variant=5) is None


def test_what_cannot_be_recorded_says_how_to_do_without(monkeypatch):
    def fail(step, memory):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "record", fail)
    with pytest.raises(ServerError, match=r"step of 1 sessions.*not permitted.*parameter `graphs`.* 0 for none"):
        Graphs(lambda x, variant: (x,), (Input((1,)),), DEVICE, largest=1)


def test_no_graphs_on_a_cpu_nor_for_plain_networks():
    assert Weights("tiny").graph_batch == 0
    assert Weights("tiny", device="cuda:0").graph_batch == cuda_graphs.BATCHES[-1]
    assert Weights("tiny", device="cuda:0", plain=True).graph_batch == 0
    assert Weights("tiny", device="cuda:0", graph_batch=16).graph_batch == 16


def test_frames_are_denoised_as_without_graphs(weights):
    plain = DiffusionStage(weights)
    stage = DiffusionStage(weights)
    graphed(stage, stage._graphed, variants=(wire.DEFAULT_DIFFUSION_STEPS,))
    hidden = weights.config.text_config.hidden_size
    for count in (1, 3, 8, 9, 2):
        given = torch.randn(count, 2, hidden), torch.randn(count, wire.LATENT_SIZE), torch.rand(count, 1)
        for steps in ([wire.DEFAULT_DIFFUSION_STEPS] * count, [4] * count):
            torch.testing.assert_close(stage.denoise(*given, steps), plain.denoise(*given, steps), **CLOSE)


def test_the_vocoder_keeps_every_state_as_without_graphs(weights):
    plain, stage = VocoderStage(weights), VocoderStage(weights)
    graphed(stage, stage._graphed)
    sessions = list(range(9))
    for each in (plain, stage):
        for session in sessions:
            each.open(session)
    for together in ([0, 1, 2], [1], sessions, [2, 0, 7, 5, 3], [4, 8]):
        latent = torch.randn(len(together), wire.LATENT_SIZE)
        token = torch.full((len(together),), wire.TOKEN_SPEECH_FRAME)
        token[1:2] = wire.TOKEN_SPEECH_END  # this one's state stays
        for mine, other in zip(stage.step(together, latent, token), plain.step(together, latent, token), strict=True):
            torch.testing.assert_close(mine, other, **CLOSE)
    for session in sessions:
        torch.testing.assert_close(stage.close(session), plain.close(session), **CLOSE)


def test_sessions_of_the_llm_step_as_without_graphs(weights):
    plain, stage = LLMStage(weights), LLMStage(weights)
    graphed(stage, stage.compute, largest=4, variants=(2,))
    for each in (plain, stage):
        for session, prompt in enumerate((3, 40, 700, 1100, 20)):  # the fourth is longer than its graphs are for
            torch.manual_seed(session)
            each.open(session, prompt, 20, forced=session != 1)
            each.prefill(session, torch.randint(0, 100, (prompt,)), torch.empty(0, wire.LATENT_SIZE))
    for together in ([0], [0, 1, 2], [4, 2, 0], [3, 1], [0, 1, 2, 4], [0, 1, 2, 3, 4], [2]):
        latent, semantic = torch.randn(len(together), wire.LATENT_SIZE), torch.randn(len(together), wire.SEMANTIC_SIZE)
        answers = [each.step(together, latent, semantic) for each in (stage, plain)]
        torch.testing.assert_close(answers[0][0], answers[1][0], **CLOSE)
        assert torch.equal(answers[0][1], answers[1][1])
    for mine, other in zip(stage.sessions.states(), plain.sessions.states(), strict=True):
        for branch, same in ((mine.with_prompt, other.with_prompt), (mine.without_prompt, other.without_prompt)):
            assert branch.length == same.length
            torch.testing.assert_close(
                branch.kv[:, :, :, : branch.length], same.kv[:, :, :, : same.length], atol=1e-3, rtol=1e-3
            )


def test_rows_that_fill_a_batch_up_touch_no_session(weights):
    """Their cache is nobody's, also after a larger batch with other sessions in these rows."""
    stage = LLMStage(weights)
    graphed(stage, stage.compute, largest=4, variants=(2,))
    for session in range(4):
        stage.open(session, 1, 10)
        stage.prefill(session, torch.zeros(1, dtype=torch.long), torch.empty(0, wire.LATENT_SIZE))
    step = lambda *ids: stage.step(list(ids), torch.randn(len(ids), 64), torch.randn(len(ids), 128))  # noqa: E731
    step(0, 1, 2, 3)
    for branch in (stage.sessions.get(3).with_prompt, stage.sessions.get(3).without_prompt):
        branch.kv.fill_(7.0)  # what a stale row of the step before would overwrite
    step(0, 1, 2)
    for branch in (stage.sessions.get(3).with_prompt, stage.sessions.get(3).without_prompt):
        assert bool((branch.kv == 7.0).all())


def test_graphs_reach_the_models_last_position():
    for most in (1, 511, 512, 1024, 1025, 32_768, 65_536):
        variants = ragged.recorded_parts(most)
        assert ragged.parts_of([most - 1]) <= variants[-1] and sorted(set(variants)) == variants
    assert len(ragged.recorded_parts(65_536)) <= 4 and ragged.recorded_parts(100) == [2]


@pytest.mark.skipif(not HAS_GPU, reason="flash attention of 16 bits runs on a GPU alone")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_prompt_in_parts_is_the_prompt_at_once(dtype):
    stage = LLMStage(Weights("tiny", plain=True, device="cuda", dtype=dtype))
    tokens = torch.randint(0, 100, (900,))
    for session, parts in ((0, [900]), (1, [1, 300, 599])):
        stage.open(session, 900, 4)
        for part in tokens.split(parts):
            stage.prefill(session, part, torch.empty(0, wire.LATENT_SIZE))
    whole, in_parts = (state.with_prompt.kv[:, :, :, :900].float() for state in stage.sessions.states())
    assert float((whole - in_parts).norm() / whole.norm()) < 0.02
