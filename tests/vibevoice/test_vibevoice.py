"""The stages against the released implementation, alone and sharing batches."""

import json

import pytest
import torch
import transformers.models.vibevoice.generation_vibevoice as generation
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from stage_speaker import Speaker
from transformers import AutoModel, LogitsProcessor, LogitsProcessorList, VibeVoiceForConditionalGeneration
from transformers.models.vibevoice_acoustic_tokenizer.modeling_vibevoice_acoustic_tokenizer import (
    VibeVoiceAcousticTokenizerConv1dPaddingCache,
)

from harness import wire
from harness.errors import InputError, RequestError
from harness.vibevoice.entry.voices import load_voices
from harness.vibevoice.sessions.table import IDLE_LIMIT_S
from harness.vibevoice.stages.configuration import preset_config
from harness.vibevoice.stages.diffusion import DiffusionStage, solver_updates
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights, randomise_
from harness.vibevoice.stages.released import released_config
from harness.vibevoice.stages.towers import Tower
from harness.vibevoice.stages.vocoder import VocoderStage
from harness.vibevoice.stages.voice_encoder import VoiceStage

NO_VOICE_FRAMES = torch.empty(0, wire.LATENT_SIZE)


@pytest.fixture(scope="module")
def weights():
    torch.set_num_threads(1)
    return Weights("tiny", seed=0)


@pytest.fixture(scope="module")
def full_model(weights):
    model = VibeVoiceForConditionalGeneration(released_config(weights.config)).eval()
    randomise_(model, seed=0)
    return model


class ForceFrames(LogitsProcessor):
    def __init__(self, token_id):
        self.token_id = token_id

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token_id] = 0
        return forced


def generated(model, token_ids, noise, monkeypatch, **voice):
    """Audio of ``generate`` for a prompt, with this noise [frames, 64] and as many forced frames."""
    config = model.config
    forced = LogitsProcessorList([ForceFrames(config.audio_token_id)])
    monkeypatch.setattr(model, "_get_logits_processor", lambda *_, **__: forced)
    rows, randn = iter(noise), torch.randn
    given = lambda *shape, **kw: next(rows).repeat(shape[0], 1) if shape[1:] == (64,) else randn(*shape, **kw)  # noqa: E731
    monkeypatch.setattr(generation.torch, "randn", given)
    ids = torch.cat([token_ids, torch.tensor([config.audio_bos_token_id])])[None]
    with torch.inference_mode():
        audio = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(noise),
            guidance_scale=wire.DEFAULT_GUIDANCE_SCALE,
            do_sample=False,
            **voice,
        )
    monkeypatch.undo()
    return audio[0].flatten()


def prompt_of(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4000, (length,), generator=generator)


def noise_of(seed, frames):
    return torch.randn(frames, 64, generator=torch.Generator().manual_seed(1000 + seed))


def test_sessions_that_share_batches_speak_as_generate_does_alone(weights, full_model, monkeypatch):
    speaker = Speaker(weights)
    plans = {1: (5, 40, 0), 2: (60, 12, 3), 3: (23, 25, 7), 4: (9, 1, 9)}  # prompt tokens, frames, first step
    prompts = {i: prompt_of(i, tokens) for i, (tokens, _, _) in plans.items()}
    noises = {i: noise_of(i, frames) for i, (_, frames, _) in plans.items()}
    for now in range(60):
        for i, (_, frames, first) in plans.items():
            if now == first:
                speaker.open(i, prompts[i], frames, parts=i)
        speaking = {i: noises[i][now - first] for i, (_, frames, first) in plans.items() if 0 <= now - first < frames}
        if speaking:
            speaker.step(speaking)
    for i in plans:
        expected = generated(full_model, prompts[i], noises[i], monkeypatch)
        torch.testing.assert_close(torch.cat(speaker.audio[i]), expected, atol=1e-4, rtol=0)


def test_a_voice_sample_conditions_the_prompt_as_in_generate(weights, full_model, monkeypatch):
    config = weights.config
    sample = torch.tensor(load_voices()[1][: 3 * wire.SAMPLES_PER_FRAME - 100])
    places = [config.audio_bos_token_id, *[config.audio_token_id] * 3, config.audio_eos_token_id]
    prompt = torch.cat([prompt_of(1, 8), torch.tensor(places), prompt_of(2, 11)])
    noise = noise_of(5, 10)
    speaker = Speaker(weights)
    speaker.open(1, prompt, 10, VoiceStage(weights).encode(sample), parts=4)
    for row in noise:
        speaker.step({1: row})
    encode = full_model.model.audio_tower.encode  # generate adds noise to it, and before transformers 5.23 always does
    without_noise = lambda values, sample=True, **kw: encode(values, sample=False, **kw)  # noqa: E731
    monkeypatch.setattr(full_model.model.audio_tower, "encode", without_noise)
    padded = torch.nn.functional.pad(sample, (0, 100))
    voice = {"input_values": padded[None, None], "padding_mask": torch.ones(1, len(padded), dtype=torch.bool)}
    expected = generated(full_model, prompt, noise, monkeypatch, **voice)
    torch.testing.assert_close(torch.cat(speaker.audio[1]), expected, atol=1e-4, rtol=0)


def test_a_token_that_is_no_speech_frame_leaves_the_convolution_state_alone(weights):
    vocoder = VocoderStage(weights)
    vocoder.open(1)
    vocoder.open(2)
    latent = noise_of(1, 3)
    frame, other = torch.tensor([wire.TOKEN_SPEECH_FRAME]), torch.tensor([wire.TOKEN_SPEECH_END])
    straight = [vocoder.step([1], latent[i : i + 1], frame)[0] for i in (0, 2)]
    first, _ = vocoder.step([2], latent[:1], frame)
    silent, _ = vocoder.step([2], latent[1:2], other)
    second, _ = vocoder.step([2], latent[2:], frame)
    assert silent.abs().max() == 0
    torch.testing.assert_close(torch.cat([first, second]), torch.cat(straight))


@pytest.mark.parametrize("depths", [(1,) * 7, (2, 1, 3, 1, 1, 1, 2)])
def test_the_towers_are_the_released_modules_frame_by_frame(tmp_path, depths):
    """Against transformers' own streaming, three sessions in one pass, of a shape of one's own."""
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({"num_filters": 3, "depths": depths}))
    weights = Weights(str(sizes), seed=3)
    latents = torch.randn(5, 64, 1, 3, generator=torch.Generator().manual_seed(0))  # frame, channel, time, session
    held = weights.acoustic_decoder(), weights.semantic_encoder()
    released = released_config(weights.config)
    configs = released.audio_config.decoder_config, released.semantic_model_config
    modules = [AutoModel.from_config(config).eval() for config in configs]
    for module, values in zip(modules, held, strict=True):
        module.load_state_dict(values.state_dict())
    caches = [VibeVoiceAcousticTokenizerConv1dPaddingCache() for _ in modules]
    towers = [Tower(network) for network in held]
    states = [torch.zeros(tower.state_size, 3) for tower in towers]
    for latent in latents:
        audio = modules[0](latent.permute(2, 0, 1), padding_cache=caches[0]).audio
        features = modules[1](audio, padding_cache=caches[1]).latents
        ours, states[0] = towers[0](latent, states[0])
        torch.testing.assert_close(ours.permute(2, 0, 1), audio, atol=1e-5, rtol=1e-4)
        ours, states[1] = towers[1](ours, states[1])
        torch.testing.assert_close(ours.permute(2, 1, 0), features, atol=1e-5, rtol=1e-4)


def test_rows_of_one_batch_have_steps_and_guidance_of_their_own(weights):
    stage = DiffusionStage(weights)
    condition, noise = torch.randn(4, 2, 64), torch.randn(4, 64)
    guidance, steps = torch.tensor([[1.0], [1.3], [3.0], [1.3]]), [10, 5, 10, 20]
    together = stage.denoise(condition, noise, guidance, steps)
    for i in range(4):
        alone = stage.denoise(condition[i : i + 1], noise[i : i + 1], guidance[i : i + 1], steps[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_a_convolution_state_goes_on_in_another_session(weights):
    vocoder, latent, frame = VocoderStage(weights), noise_of(3, 6), torch.tensor([wire.TOKEN_SPEECH_FRAME])
    vocoder.open(1)
    whole = [vocoder.step([1], row[None], frame)[0] for row in latent]
    vocoder.open(2)
    first = [vocoder.step([2], row[None], frame)[0] for row in latent[:3]]
    state = vocoder.close(2)
    assert len(state) == vocoder.state_size
    vocoder.open(3, state)
    rest = [vocoder.step([3], row[None], frame)[0] for row in latent[3:]]
    torch.testing.assert_close(torch.cat(first + rest), torch.cat(whole))
    with pytest.raises(RequestError, match="convolution state has 7 values"):
        vocoder.open(4, torch.zeros(7))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "unknown keys"),
        ('{"hiden_size": 64}', "hiden_size"),
        ('{"base": "huge"}', "huge"),
        ('{"hidden_size": 65}', "even number"),
        ('{"num_attention_heads": 4, "num_key_value_heads": 3}', "multiple of KV heads"),
        ('{"depths": [1, 2]}', "7 numbers"),
        ('{"num_filters": "many"}', "whole number"),
        ('{"num_attention_heads": 0}', "at least 1"),
        ('{"num_hidden_layers": true}', "whole number"),
        ('{"hidden_size": "64"}', "whole number"),
        ('{"depths": 5}', "7 numbers"),
        ('{"depths": [1, 1, 1, 1, 1, 1, -1]}', "whole number"),
        ('{"base": []}', "use one of tiny"),
    ],
)
def test_sizes_of_ones_own_that_do_not_fit_are_refused(tmp_path, content, message):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(InputError, match=message):
        preset_config(str(tmp_path / "own.json"))


def test_room_is_counted_before_a_session_is_accepted(weights):
    llm = LLMStage(weights, kv_limit_bytes=1 << 20)
    assert llm.kv_bytes_per_token == 512  # 2 (K, V) x 2 layers x 2 heads x 16 x 4 bytes
    llm.open(1, prompt_tokens=98, frames=900)
    assert llm.kv_bytes == (98 + 1 + 900 + 1 + 900) * 512
    with pytest.raises(RequestError, match="busy"):
        llm.open(2, prompt_tokens=98, frames=900)
    llm.close(1)
    assert llm.kv_bytes == 0
    llm.open(2, prompt_tokens=98, frames=900)
    llm.close(2)
    with pytest.raises(RequestError, match=r"say has unknown tokens: \[7\]"):
        llm.open(3, prompt_tokens=1, frames=1, say=[wire.TOKEN_SPEECH_FRAME, 7])
    assert llm.kv_bytes == 0


def test_sessions_whose_owner_died_give_their_room_back(weights):
    llm, now = LLMStage(weights, kv_limit_bytes=1 << 20), 0.0
    llm.sessions._clock = lambda: now
    llm.open(1, prompt_tokens=98, frames=900)
    now = IDLE_LIMIT_S + 1
    llm.open(2, prompt_tokens=98, frames=900)
    assert len(llm.sessions) == 1


def test_a_session_that_starts_late_holds_the_positions_of_its_past(weights):
    speaker = Speaker(weights)
    speaker.open(1, prompt_of(1, 10), frames=3, start_frame=500)
    session = speaker.llm.sessions.get(1)
    assert (session.with_prompt.length, session.without_prompt.length) == (510, 500)
    for row in noise_of(1, 3):
        speaker.step({1: row})
    assert (session.with_prompt.length, session.without_prompt.length) == (513, 503)
    assert torch.cat(speaker.audio[1]).isfinite().all()
    with pytest.raises(RequestError, match="reserved"):
        [speaker.step({1: row}) for row in noise_of(2, 5)]


def test_an_unknown_session_is_refused_by_name(weights):
    with pytest.raises(RequestError, match="no such session"):
        LLMStage(weights).step([99], torch.zeros(1, 64), torch.zeros(1, 128))


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
def test_the_solver_is_the_schedulers_own(steps):
    """Our three numbers per step against diffusers' scheduler, on a model that answers with a fixed velocity."""
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    velocity = torch.randn(steps, 64, generator=torch.Generator().manual_seed(0))
    expected = x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for v, t in zip(velocity, scheduler.timesteps, strict=True):
        expected = scheduler.step(v[None], t, expected[None]).prev_sample[0]
    before = torch.zeros_like(x)
    for v, (alpha, sigma, a, b, c) in zip(velocity, solver_updates(steps)[1], strict=True):
        x0 = alpha * x - sigma * v
        x, before = a * x + b * x0 + c * before, x0
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("1.5b", (1310, 233, 123, 344, 345, 344)), ("7b", (6526, 1090, 669, 344, 345, 344))],
)
def test_presets_have_the_documented_sizes(preset, millions):
    with torch.device("meta"):
        model = VibeVoiceForConditionalGeneration(released_config(preset_config(preset))).model
    embeddings = model.language_model.embed_tokens
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    found = (
        count(model.language_model) - count(embeddings),
        count(embeddings) * (1 if preset == "1.5b" else 2),  # untied: the output matrix is a second one
        count(model.diffusion_head),
        count(model.audio_tower.decoder),
        count(model.semantic_tokenizer_encoder),
        count(model.audio_tower.encoder),
    )
    assert found == pytest.approx(millions, abs=1.0)


def test_weights_come_from_a_checkpoint_folder_too(weights, full_model, tmp_path):
    full_model.save_pretrained(tmp_path)
    loaded = Weights(checkpoint=str(tmp_path))
    for build in ("backbone", "diffusion_head", "acoustic_decoder", "semantic_encoder", "acoustic_connector"):
        ours, theirs = getattr(weights, build)().state_dict(), getattr(loaded, build)().state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.latent_scale_and_bias() == pytest.approx(weights.latent_scale_and_bias())
    assert torch.equal(loaded.head_rows([1, 2]), weights.head_rows([1, 2]))


def test_what_is_no_checkpoint_or_preset_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        Weights(checkpoint=str(tmp_path))
    with pytest.raises(InputError, match="tiny, 1.5b, 7b"):
        preset_config("2b")
    for content, message in (("{", "cannot be read"), ("{}", "model_type"), ('{"model_type": "llama"}', "type llama")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=message):
            Weights(checkpoint=str(tmp_path))


def test_a_checkpoint_that_is_not_whole_is_said_to_be_so(full_model, tmp_path):
    full_model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    save_file({**whole, name: whole[name][:1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="other sizes than its config.json"):
        Weights(checkpoint=str(tmp_path)).acoustic_connector()
    for index in ("{", "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(InputError, match="holds no readable tensor model.multi_modal_projector"):
            Weights(checkpoint=str(tmp_path)).acoustic_connector()
