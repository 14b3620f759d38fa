"""The stages' networks hold what transformers' modules hold: names, shapes and buffers."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu, silu
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel
from transformers.models.vibevoice.modeling_vibevoice import VibeVoiceDiffusionHead, VibeVoiceMultiModalProjector

from harness import wire
from harness.errors import InputError
from harness.vibevoice.profiling.roofline import Roofline
from harness.vibevoice.stages import networks
from harness.vibevoice.stages.configuration import preset_config
from harness.vibevoice.stages.released import released_config


def pairs(config):
    """Ours and the released module of each part."""
    theirs, hidden = released_config(config), config.text_config.hidden_size
    audio, released = config.audio_config, theirs.audio_config
    yield networks.Qwen2(config.text_config), AutoModel.from_config(theirs.text_config)
    yield networks.Connector(64, hidden), VibeVoiceMultiModalProjector(64, hidden)
    yield networks.DiffusionHead(config.diffusion_head_config), VibeVoiceDiffusionHead(theirs.diffusion_head_config)
    yield networks.Decoder(audio.decoder_config), AutoModel.from_config(released.decoder_config)
    yield networks.Encoder(audio.encoder_config), AutoModel.from_config(released.encoder_config)
    yield networks.Encoder(config.semantic_model_config), AutoModel.from_config(theirs.semantic_model_config)


@pytest.mark.parametrize("preset", ["tiny", "1.5b", "7b"])
def test_names_and_shapes_are_the_released_ones(preset):
    with torch.device("meta"):
        for ours, released in pairs(preset_config(preset)):
            shapes = lambda module: {name: each.shape for name, each in module.named_parameters()}  # noqa: E731
            assert shapes(ours) == shapes(released)


@pytest.mark.parametrize("preset", ["tiny", "1.5b", "7b"])
def test_operations_of_the_roofline_are_what_torch_counts_in_the_released_modules(preset):
    config = preset_config(preset)
    costs, hidden = Roofline(config, 2), config.text_config.hidden_size
    ours = costs.head, costs.decoder, costs.acoustic_encoder, costs.semantic_encoder
    with torch.device("meta"), torch.no_grad():
        latent, sound = torch.empty(1, wire.LATENT_SIZE), torch.empty(1, 1, wire.SAMPLES_PER_FRAME)
        given = (latent, torch.empty(1), torch.empty(1, hidden)), (latent[..., None],), (sound,), (sound,)
        for part, (_, module), inputs in zip(ours, [*pairs(config)][2:], given, strict=True):
            with FlopCounterMode(display=False) as counter:
                module(*inputs)
            assert part.operations == counter.get_total_flops()
            assert part.parameters == sum(each.numel() for each in module.parameters())


def test_buffers_pads_and_epsilons_are_the_released_ones():
    for ours, released in pairs(preset_config("tiny")):
        theirs = dict(released.named_buffers())
        for name, buffer in ours.named_buffers():
            assert torch.equal(buffer, theirs[name]) and buffer.dtype == torch.float32
        modules = dict(released.named_modules())
        for name, module in ours.named_modules():
            for fact in ("left_pad", "stride", "variance_epsilon", "rms_norm_eps"):
                if hasattr(module, fact) and not isinstance(module, networks.Convolution | networks.Transposed):
                    assert getattr(module, fact) == getattr(modules[name], fact), (name, fact)


def test_activations_are_the_released_ones():
    x = torch.linspace(-4, 4, 100)
    for ours, released in pairs(preset_config("tiny")):
        for name, module in released.named_modules():
            for fact in ("act_fn", "activation", "activation_fn"):
                mine = getattr(ours.get_submodule(name), fact, None) if name in dict(ours.named_modules()) else None
                if mine is not None:
                    assert mine in (silu, gelu)
                    torch.testing.assert_close(mine(x), getattr(module, fact)(x))


def test_what_no_released_model_has_is_refused():
    config = preset_config("tiny").text_config
    with pytest.raises(InputError, match="'relu' in config.json is not one of silu, gelu"):
        networks.Qwen2(replace(config, hidden_act="relu"))
    with pytest.raises(InputError, match="'yarn': only 'default'"):
        networks.Qwen2(replace(config, rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}))
