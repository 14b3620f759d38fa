"""The steps of the fused engine against the stages of the staged ensemble, session by session."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.engine.frame_step import EagerStep, Opening, PromptPart, Row
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage

ROOM = 1 << 28
F, B, E = wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_BEGIN, wire.TOKEN_SPEECH_END


@pytest.fixture(scope="module")
def weights():
    return Weights("tiny", seed=4, plain=True)


@pytest.fixture(params=["eager", "graph"])
def step(request, weights):
    if request.param == "eager":
        return EagerStep(weights, ROOM, 256)
    pytest.importorskip("triton", reason="the package triton is not installed")
    request.getfixturevalue("interpreted")
    from harness.vibevoice.engine.graph_step import GraphStep

    return GraphStep(weights, ROOM, 8)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Script:
    """What one session asks for, and its steps through the three stages by itself."""

    def __init__(self, number, tokens, frames, steps=10, guidance=1.3, say=(), start_frame=0, forced=True):
        draw = np.random.default_rng(number)
        self.number, self.steps, self.guidance, self.frames = number, steps, guidance, frames
        self.ids = draw.integers(0, 4000, tokens).astype(np.int32)
        self.ids[1:3] = 4095  # places of a voice
        self.voice = draw.standard_normal((2, wire.LATENT_SIZE), np.float32)
        self.noise = draw.standard_normal((frames + len(say), wire.LATENT_SIZE), np.float32)
        self.opening = Opening(tokens, start_frame + frames, start_frame, forced, tuple(say))

    def row(self, i):
        return Row(self.number, self.noise[i], self.guidance, self.steps)

    def expected(self, weights):
        llm, diffusion, vocoder = LLMStage(weights, ROOM), DiffusionStage(weights), VocoderStage(weights)
        opening, latent, semantic = self.opening, torch.zeros(1, 64), torch.zeros(1, 128)
        llm.open(1, opening.prompt_tokens, opening.frames, opening.start_frame, opening.forced, opening.say)
        vocoder.open(1)
        if not opening.start_frame:
            llm.prefill(1, torch.from_numpy(self.ids), torch.from_numpy(self.voice))
        said, audio = [], []
        for noise in torch.from_numpy(self.noise):
            condition, token = llm.step([1], latent, semantic)
            said.append(int(token))
            if said[-1] == F:
                latent = diffusion.denoise(condition, noise[None], torch.tensor([[self.guidance]]), [self.steps])
                made, semantic = vocoder.step([1], latent, token)
                audio.append(made[0].numpy())
        return said, np.array(audio), vocoder.close(1).numpy()


def parts(script, size):
    used = 0
    for start in range(0, 0 if script.opening.start_frame else len(script.ids), size):
        ids = script.ids[start : start + size]
        places = int((ids == 4095).sum())
        yield PromptPart(script.number, ids, script.voice[used : used + places])
        used += places


def test_sessions_that_join_and_leave_sound_as_if_they_were_alone(step, weights):
    """Two join before each step; the values of a step are taken when the next one has been launched."""
    scripts = [
        Script(1, 9, 4),
        Script(2, 14, 2, steps=4, guidance=2.0),
        Script(3, 5, 3, say=(F, E, B, F)),
        Script(4, 4, 2, start_frame=6),
        Script(5, 4, 3, forced=False),
        Script(6, 3, 1),
    ]
    expected = {script.number: script.expected(weights) for script in scripts}
    said, audio = ({script.number: [] for script in scripts} for _ in range(2))
    waiting, active, behind = list(scripts), [], None
    while waiting or active or behind:
        joining, waiting = waiting[:2], waiting[2:]
        for script in joining:
            step.open(script.number, script.opening)
        for together in itertools.zip_longest(*(parts(script, 8) for script in joining)):
            step.read([part for part in together if part])
        active += joining
        launched = step.launch([script.row(len(said[script.number])) for script in active]) if active else None
        for number, token, made in taken(behind):
            if token == F:
                audio[number].append(made)
        behind = (launched, [script.number for script in active]) if launched else None
        for script, token in zip(list(active), launched.tokens if launched else (), strict=False):
            said[script.number].append(token)
            if len(said[script.number]) == len(script.noise):
                active.remove(script)
                np.testing.assert_allclose(step.close(script.number, keep=True), expected[script.number][2], atol=1e-4)
    for number, (tokens, sound, _) in expected.items():
        assert said[number] == tokens
        np.testing.assert_allclose(np.array(audio[number]), sound, atol=1e-4)


def taken(behind):
    if behind is None:
        return ()
    frames, numbers = behind
    return zip(numbers, frames.tokens, frames.values()[0], strict=True)


def test_a_session_goes_on_where_it_was_kept(step, weights):
    """Its state, its last frame, and its past, read anew."""
    script = Script(7, 6, 6)
    whole = script.expected(weights)[1]
    step.open(1, Opening(6, 6))
    for part in parts(script, 8):
        step.read([replace(part, session=1)])
    fed = []
    for i in range(3):
        _, latent, semantic = step.launch([replace(script.row(i), session=1)]).values()
        fed.append((latent[0].copy(), semantic[0].copy()))
    state = step.close(1, keep=True)
    step.open(2, Opening(6, 6, state=state, latent=fed[-1][0], semantic=fed[-1][1]))
    for part in parts(script, 8):
        step.read([replace(part, session=2)])
    zeros = np.zeros(wire.LATENT_SIZE, np.float32), np.zeros(wire.SEMANTIC_SIZE, np.float32)
    before = [zeros, *fed[:-1]]
    step.replay(2, np.full(3, F), *(np.array([each[i] for each in before]) for i in range(2)))
    audio = [step.launch([replace(script.row(i), session=2)]).values()[0][0] for i in range(3, 6)]
    np.testing.assert_allclose(np.array(audio), whole[3:], atol=1e-4)


def test_a_session_that_cannot_be_opened_leaves_nothing_behind(step):
    with pytest.raises(RequestError, match="a convolution state has 3 values"):
        step.open(1, Opening(6, 6, state=np.zeros(3, np.float32)))
    assert not len(step.llm.sessions) and step.llm.kv_bytes == 0
    for number in range(1, 9):
        step.open(number, Opening(2, 2))  # all eight slots are there
