"""What sessions say besides frames, natural ends, and pasts that are taken up again: against transformers' generate."""

import os
import subprocess
from dataclasses import replace

import pytest
import torch
import transformers.models.vibevoice.generation_vibevoice as generation
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_sessions import BEGIN, END, FRAME, NO_VOICE_FRAMES, STOP, Stages, Talk
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    VibeVoiceForConditionalGeneration,
)

from harness.errors import RequestError
from harness.vibevoice.sessions.table import SPARE_STEPS, session_ids
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights, randomise_
from harness.vibevoice.stages.released import released_config

SAID = {
    "frames only": [],
    "a pause": [FRAME, FRAME, END, BEGIN, FRAME, FRAME],
    "begin at the start": [BEGIN, FRAME],
    "two begins": [FRAME, FRAME, BEGIN, BEGIN, FRAME],
    "end, then frames": [FRAME, END, FRAME],
    "end at the start": [END, FRAME, FRAME, BEGIN],
    "two ends, then frames": [FRAME, END, END, FRAME, FRAME, END, BEGIN, END, FRAME],
    "end of text": [FRAME, FRAME, END, STOP],
}


class Told(LogitsProcessor):
    """Makes generate say these token ids; after them what it would say itself, or always ``then``."""

    def __init__(self, start, ids, then):
        self.start, self.ids, self.then = start, ids, then

    def __call__(self, input_ids, scores):
        said = input_ids.shape[1] - self.start
        token = self.ids[said] if said < len(self.ids) else self.then
        if token is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0
        return forced


class Oracle:
    """``generate`` of transformers with these weights, told what to say, with the noise of our own sessions.

    With a guidance scale other than 1, ``generate`` takes its own general-purpose guidance of *text* along, a third
    pass over the bare token ids. The released model's code has no such thing, nor have we: it is left out.
    """

    def __init__(self, weights):
        self.config = config = weights.config
        self.model = VibeVoiceForConditionalGeneration(released_config(config)).eval()
        randomise_(self.model, seed=weights.seed)
        self.model.generation_config.eos_token_id = config.eos_token_id
        self.ids = [config.audio_token_id, config.audio_bos_token_id, config.audio_eos_token_id, config.eos_token_id]

    def speak(self, monkeypatch, prompt, steps_taken, say, noise, guidance, steps, forced=True):
        """(audio [samples], tokens) of ``steps_taken`` steps, or fewer where it ends by itself."""
        ids = torch.cat([prompt, torch.tensor([self.config.audio_bos_token_id])])[None]
        rows, randn, model = iter(noise), torch.randn, self.model
        told = Told(ids.shape[1], [self.ids[token] for token in say], self.ids[FRAME] if forced else None)

        def own(*args, **kw):
            found = type(model)._get_logits_processor(model, *args, **kw)
            guiding = UnbatchedClassifierFreeGuidanceLogitsProcessor
            return LogitsProcessorList([*(one for one in found if not isinstance(one, guiding)), told])

        row = lambda *shape, **kw: next(rows).repeat(shape[0], 1) if shape[1:] == (64,) else randn(*shape, **kw)  # noqa: E731
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(model, "_get_logits_processor", own)
            patch.setattr(generation.torch, "randn", row)
            answer = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps_taken,
                guidance_scale=guidance,
                num_diffusion_steps=steps,
                do_sample=False,
                return_dict_in_generate=True,
            )
        tokens = [self.ids.index(i) for i in answer.sequences[0, ids.shape[1] :].tolist()]
        audio = answer.audio[0]
        return (torch.empty(0) if audio is None else audio.flatten()), tokens


@pytest.fixture(scope="module")
def weights():
    torch.set_num_threads(1)
    return Weights("tiny", seed=0)


@pytest.fixture(scope="module")
def stages(weights):
    return Stages(weights)


@pytest.fixture(scope="module")
def oracle(weights):
    return Oracle(weights)


def prompt_of(seed, length):
    return torch.randint(0, 4000, (length,), generator=torch.Generator().manual_seed(seed))


def noise_of(seed, frames):
    return torch.randn(frames, 64, generator=torch.Generator().manual_seed(1000 + seed))


def assert_same(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_besides_frames_is_as_in_generate(stages, oracle, monkeypatch, name):
    say, prompt, noise = SAID[name], prompt_of(7, 31), noise_of(3, 24)
    others = len(say) - say.count(FRAME)
    talk = Talk(24, noise)
    stages.open(1, prompt, talk.frames, say=say)
    stages.speak(1, talk)
    audio, tokens = oracle.speak(monkeypatch, prompt, 24 + others, say, noise, talk.guidance, talk.steps)
    assert talk.tokens == tokens == (say + [FRAME] * 24)[: len(tokens)]
    assert (tokens[-1] == STOP) == (STOP in say)
    assert_same(talk.heard(), audio)


@pytest.mark.parametrize(("steps", "guidance"), [(5, 3.0), (20, 1.0), (1, 1.3), (10, 0.0)])
def test_steps_and_guidance_are_each_sessions_own(stages, oracle, monkeypatch, steps, guidance):
    """The session shares its batches with one of other values, that says other things."""
    prompt, noise, say = prompt_of(2, 12), noise_of(4, 16), SAID["a pause"]
    talk, other = Talk(16, noise, guidance, steps), Talk(30, noise_of(5, 30))
    stages.open(1, prompt, 16, say=say)
    stages.open(2, prompt_of(3, 50), 30, say=SAID["two begins"])
    while not talk.ended:
        stages.step({2: other, 1: talk})
    audio, tokens = oracle.speak(monkeypatch, prompt, 18, say, noise, guidance, steps)
    assert talk.tokens == tokens
    assert_same(talk.heard(), audio)


@pytest.mark.parametrize(
    ("seed", "prompt_seed", "said"),
    [
        (0, 4, "FFFBFEFEBFS"),
        (3, 5, "FFBFBFBFBFBFFEEEBFFEEEEEBFFS"),
        (6, 6, "FFBBFFFFBBBFBBBBBFFEBBBFEEEEEEEEEEEEEEEE"),  # and so on: it would never end by itself
        (11, 4, "FEEEEEEEEFEFFEFBEFBEFBFFFS"),
    ],
)
def test_a_session_that_is_not_forced_says_what_generate_says(monkeypatch, seed, prompt_seed, said):
    """Random weights, at seeds where they say all kinds of tokens by themselves."""
    weights = Weights("tiny", seed=seed)
    stages, oracle = Stages(weights), Oracle(weights)
    prompt, noise = prompt_of(prompt_seed, 20), noise_of(6, 41)
    talk = Talk(40, noise)
    stages.open(1, prompt, 40, forced=False, say=[FRAME])
    while not talk.ended and len(talk.tokens) < 40:
        stages.step({1: talk})
    assert "".join("FBES"[token] for token in talk.tokens) == said
    audio, tokens = oracle.speak(monkeypatch, prompt, 40, [FRAME], noise, talk.guidance, talk.steps, forced=False)
    assert talk.tokens == tokens
    assert_same(talk.heard(), audio)


def resume(stages, session, prompt, kept, frames, state, cuts=(), say=()):
    """Take up what a talk said, its past replayed in parts that end at ``cuts``, for ``frames`` frames in all."""
    past = len(kept.tokens)
    stages.llm.open(session, len(prompt), past + frames - kept.frames, say=say)
    stages.llm.prefill(session, prompt, NO_VOICE_FRAMES)
    for first, last in zip([0, *cuts], [*cuts, past], strict=True):
        latent, semantic = torch.stack(kept.latents[first:last]), torch.stack(kept.semantics[first:last])
        stages.llm.replay(session, kept.tokens[first:last], latent, semantic)
    stages.vocoder.open(session, state)
    talk = replace(kept, frames=frames, tokens=[*kept.tokens], audio=[])
    stages.speak(session, talk)
    return talk


def lengths(stages, session):
    held = stages.llm.sessions.get(session)
    return held.with_prompt.length, held.without_prompt.length, held.pending_token


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_replayed_past_goes_on_as_an_unbroken_session(stages, data):
    say = data.draw(st.lists(st.sampled_from([FRAME, FRAME, END, BEGIN]), max_size=14))
    frames = say.count(FRAME) + data.draw(st.integers(2, 4))
    prompt, noise = prompt_of(1, 17), noise_of(2, 32)
    whole = Talk(frames, noise)
    stages.open(1, prompt, frames, say=say)
    stages.speak(1, whole)
    kept = Talk(data.draw(st.integers(1, frames - 1)), noise)
    stages.open(2, prompt, kept.frames, say=say)
    stages.speak(2, kept)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(kept.tokens) - 1)), max_size=3)) - {len(kept.tokens)})
    rest = resume(stages, 3, prompt, kept, frames, stages.vocoder.close(2), cuts, say[len(kept.tokens) :])
    assert rest.tokens == whole.tokens
    assert lengths(stages, 3) == lengths(stages, 1)
    assert_same(torch.cat([kept.heard(), rest.heard()]), whole.heard())


def test_a_session_may_be_kept_again_and_again(stages):
    prompt, noise = prompt_of(1, 9), noise_of(8, 60)
    whole = Talk(60, noise)
    stages.open(1, prompt, 60)
    stages.speak(1, whole)
    part = Talk(1, noise)
    stages.open(2, prompt, 1)
    stages.speak(2, part)
    heard = [part.heard()]
    for session, frames in enumerate((2, 7, 31, 60), start=3):
        part = resume(stages, session, prompt, part, frames, stages.vocoder.close(session - 1))
        heard.append(part.heard())
    assert_same(torch.cat(heard), whole.heard())


def test_a_late_start_may_be_kept_too(stages):
    prompt, noise = prompt_of(1, 9), noise_of(9, 20)
    whole, kept = Talk(20, noise), Talk(8, noise)
    for session, talk in ((1, whole), (2, kept)):
        stages.open(session, prompt, 300 + talk.frames, start_frame=300)
        stages.speak(session, talk)
    stages.llm.open(3, len(prompt), 300 + 20, start_frame=300)
    stages.llm.replay(3, kept.tokens, torch.stack(kept.latents[:-1]), torch.stack(kept.semantics[:-1]))
    stages.vocoder.open(3, stages.vocoder.close(2))
    rest = replace(kept, frames=20, tokens=[*kept.tokens], audio=[])
    stages.speak(3, rest)
    assert lengths(stages, 3) == lengths(stages, 1)
    assert_same(torch.cat([kept.heard(), rest.heard()]), whole.heard())


def test_a_prompt_gives_the_same_in_any_parts(stages):
    """One part attends under the causal flag; later parts to the past and to themselves (on a GPU, under masks)."""
    prompt, noise = prompt_of(4, 700), noise_of(1, 5)
    heard = []
    for sizes in ([700], [1, 699], [300, 1, 399], [256] * 2 + [188]):
        talk = Talk(5, noise)
        stages.llm.open(1, 700, 5)
        for part in prompt.split(sizes):
            stages.llm.prefill(1, part, NO_VOICE_FRAMES)
        stages.vocoder.open(1)
        stages.speak(1, talk)
        heard.append(talk.heard())
    for other in heard[1:]:
        assert_same(other, heard[0])


def test_room_counts_what_is_said_besides_frames(weights):
    llm = LLMStage(weights)
    per_position = llm.kv_bytes_per_token
    llm.open(1, 10, 20)
    assert llm.kv_bytes == (10 + 1 + 20 + 1 + 20) * per_position
    llm.open(1, 10, 20, say=[BEGIN, END])
    assert llm.kv_bytes == (10 + 1 + 20 + 2 + 1 + 20) * per_position
    llm.open(1, 10, 20, forced=False)
    assert llm.kv_bytes == (10 + 1 + 20 + SPARE_STEPS + 1 + 20) * per_position


def test_a_session_that_never_ends_is_stopped_when_its_room_is_used_up():
    """At these seeds the model says "begin" for ever."""
    stages = Stages(Weights("tiny", seed=0))
    talk = Talk(10, noise_of(6, 41))
    stages.open(1, prompt_of(1, 20), 10, forced=False, say=[FRAME])
    with pytest.raises(RequestError, match="the session has used up the 96 positions it reserved"):
        stages.speak(1, talk)
    assert len(talk.tokens) == 1 + 10 + 1 + SPARE_STEPS


def test_a_past_that_is_longer_than_its_room_is_refused(stages):
    stages.open(1, prompt_of(1, 5), 3)
    with pytest.raises(RequestError, match="reserved"):
        stages.llm.replay(1, [FRAME] * 9, torch.zeros(9, 64), torch.zeros(9, 128))


def test_what_never_fits_is_told_from_what_has_to_wait(weights):
    llm = LLMStage(weights, kv_limit_bytes=1 << 20)
    llm.open(1, 98, 900)
    with pytest.raises(RequestError, match=r"^busy: .*needs 0\.9277 MiB.* 0\.07227 MiB of 1 MiB are free"):
        llm.open(2, 98, 900)
    with pytest.raises(RequestError, match=r"never fit: 2100 positions .* x 512 bytes = 1\.025 MiB"):
        llm.open(2, 98, 1000)
    assert len(llm.sessions) == 1


def test_sessions_of_a_process_that_ended_give_their_room_back(weights):
    ended = subprocess.Popen(["true"])
    ended.wait()
    llm = LLMStage(weights, kv_limit_bytes=1 << 20)
    llm.open(next(session_ids(ended.pid)), 98, 900)
    llm.open(next(session_ids(os.getpid())), 98, 900)
    with pytest.raises(RequestError, match="^busy"):
        llm.open(next(session_ids(os.getpid())), 98, 900)


@pytest.mark.parametrize(
    "numbers",
    [(3, 10, -5), (-1, 10, 0), (3, -1, 0), (3, 10, 11), (2**31 - 1, 10, 0), (3, 2**31 - 1, 0), (3, 0, 1), (0, -9, -9)],
)
def test_sizes_that_no_session_has_are_refused_before_memory_is_taken(weights, numbers):
    llm = LLMStage(weights)
    with pytest.raises(RequestError, match="is impossible"):
        llm.open(1, *numbers)
    assert len(llm.sessions) == 0 and llm.kv_bytes == 0


@pytest.mark.parametrize("ids", [[-1], [2**31 - 1], [0, 5, -(2**31)]])
def test_a_prompt_part_of_other_tokens_than_the_models_is_refused(stages, ids):
    stages.llm.open(1, 5, 3)
    with pytest.raises(RequestError, match="token_ids lie outside 0 to"):
        stages.llm.prefill(1, torch.tensor(ids), torch.zeros(0, 64))


def test_a_prompt_part_with_other_voice_frames_than_places_is_refused(stages):
    stages.llm.open(1, 5, 3)
    with pytest.raises(RequestError, match="1 audio tokens for 2 voice frames"):
        stages.llm.prefill(1, torch.tensor([stages.llm.config.audio_token_id]), torch.zeros(2, 64))


@pytest.mark.parametrize("tokens, rows", [([], 0), ([9], 1), ([FRAME], 2), ([FRAME, END], 1)])
def test_a_past_that_no_session_had_is_refused(stages, tokens, rows):
    stages.llm.open(1, 5, 3)
    with pytest.raises(RequestError, match="a past of"):
        stages.llm.replay(1, tokens, torch.zeros(rows, 64), torch.zeros(rows, 128))
