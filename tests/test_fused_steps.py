"""The steps of the fused engine against the stages of the staged ensemble, session by session."""

import numpy as np
import pytest
import torch

from harness import wire
from harness.vibevoice.diffusion import DiffusionStage
from harness.vibevoice.frame_step import EagerStep, Opening, PromptPart, Row
from harness.vibevoice.llm import LLMStage
from harness.vibevoice.presets import Weights
from harness.vibevoice.vocoder import VocoderStage

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
    from harness.vibevoice.graph_step import GraphStep

    return GraphStep(weights, ROOM, 8)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Script:
    """What one session asks for, and its steps through the three stages by itself."""

    def __init__(self, number, tokens, frames, steps=10, guidance=1.3, say=(), start_frame=0):
        draw = np.random.default_rng(number)
        self.number, self.steps, self.guidance, self.frames = number, steps, guidance, frames
        self.ids = draw.integers(0, 4000, tokens).astype(np.int32)
        self.ids[1:3] = 4095  # places of a voice
        self.voice = draw.standard_normal((2, wire.LATENT_SIZE), np.float32)
        self.noise = draw.standard_normal((frames + len(say), wire.LATENT_SIZE), np.float32)
        self.opening = Opening(tokens, start_frame + frames, start_frame, say=tuple(say))

    def expected(self, weights):
        llm, diffusion, vocoder = LLMStage(weights, ROOM), DiffusionStage(weights), VocoderStage(weights)
        opening, latent, semantic = self.opening, torch.zeros(1, 64), torch.zeros(1, 128)
        llm.open(1, opening.prompt_tokens, opening.frames, opening.start_frame, True, opening.say)
        vocoder.open(1)
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


def read(step, script, size):
    used = 0
    for start in range(0, len(script.ids), size):
        ids = script.ids[start : start + size]
        places = int((ids == 4095).sum())
        step.read([PromptPart(script.number, ids, script.voice[used : used + places])])
        used += places


def test_sessions_that_join_and_leave_sound_as_if_they_were_alone(step, weights):
    scripts = [
        Script(1, 11, 5),
        Script(2, 40, 3, steps=4, guidance=2.0),
        Script(3, 7, 4, say=(F, E, B, F)),
        Script(4, 5, 3, start_frame=6),
    ]
    expected = {script.number: script.expected(weights) for script in scripts}
    said, audio, at, active = {}, {}, {}, []
    waiting = list(scripts)
    while waiting or active:
        if waiting:  # one more joins before each step
            script = waiting.pop(0)
            step.open(script.number, script.opening)
            read(step, script, 16)
            active.append(script)
            at[script.number], said[script.number], audio[script.number] = 0, [], []
        rows = [Row(s.number, s.noise[at[s.number]], s.guidance, s.steps) for s in active]
        frames = step.launch(rows)
        made = frames.values()[0]
        for i, script in enumerate(list(active)):
            said[script.number].append(frames.tokens[i])
            if frames.tokens[i] == F:
                audio[script.number].append(made[i])
            at[script.number] += 1
            if at[script.number] == len(script.noise):
                active.remove(script)
                tokens, sound, state = expected[script.number]
                assert said[script.number] == tokens
                np.testing.assert_allclose(np.array(audio[script.number]), sound, atol=1e-4)
                np.testing.assert_allclose(step.close(script.number, keep=True), state, atol=1e-4)
