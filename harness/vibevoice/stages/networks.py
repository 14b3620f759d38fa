"""The networks of VibeVoice as the stages need them: parameters under a checkpoint's names, without values.

The names are those of transformers' modules, whose import takes as long as the rest of a stage's start;
tests/vibevoice/test_networks.py compares names, shapes and buffers with them. The computation is in backbone.py,
diffusion.py and towers.py.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from harness.errors import InputError

_ACTIVATIONS = {"silu": functional.silu, "gelu": functional.gelu}


class _Unfilled:
    """Skips initialisation: the values come from a checkpoint or a seed."""

    def reset_parameters(self) -> None:
        pass


class Linear(_Unfilled, nn.Linear):
    pass


class Embedding(_Unfilled, nn.Embedding):
    pass


class Convolution(_Unfilled, nn.Conv1d):
    pass


class Transposed(_Unfilled, nn.ConvTranspose1d):
    pass


class Norm(nn.Module):
    """Root mean square norm over the last axis, multiplied by the weight."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.empty(size)), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)


class GatedNetwork(nn.Module):
    """The feed-forward network of a backbone or head layer."""

    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Linear(hidden, inner, bias=False), Linear(hidden, inner, bias=False)
        self.down_proj, self.act_fn = Linear(inner, hidden, bias=False), activation(config)


def activation(config):
    """The activation function. Raises InputError for one that no released model uses."""
    try:
        return _ACTIVATIONS[config.hidden_act]
    except KeyError:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"the activation {config.hidden_act!r} in config.json is not one of {known}") from None


# The LLM stage: Qwen2, and the connectors that feed a frame back


class Qwen2(nn.Module):
    """The backbone of ``config.text_config``; ``rotary_emb.inv_freq`` [head size / 2] is float32 in any dtype.

    Raises InputError for position embeddings other than those of the released models.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rotation(config)


class Qwen2Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), GatedNetwork(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        kv = hidden // config.num_attention_heads * config.num_key_value_heads
        self.q_proj, self.o_proj = Linear(hidden, hidden), Linear(hidden, hidden, bias=False)
        self.k_proj, self.v_proj = Linear(hidden, kv), Linear(hidden, kv)


class Rotation(nn.Module):
    def __init__(self, config):
        super().__init__()
        given = config.rope_parameters
        if given.get("rope_type", "default") != "default":
            raise InputError(
                f"the backbone's positions are of type {given['rope_type']!r}: only 'default' is supported"
            )
        size = config.hidden_size // config.num_attention_heads
        powers = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        self.register_buffer("inv_freq", 1.0 / given["rope_theta"] ** powers, persistent=False)


class Connector(nn.Module):
    """Maps latents or features of a frame to inputs of the backbone."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = Linear(inputs, hidden), Norm(hidden, 1e-6), Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


# The diffusion stage


class DiffusionHead(nn.Module):
    """The head of ``config.diffusion_head_config``."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.noisy_images_proj = Linear(config.latent_size, hidden, bias=False)
        self.cond_proj = Linear(hidden, hidden, bias=False)
        self.timestep_embedding = Timesteps(config)
        self.timestep_proj = TimestepNetwork(config)
        self.layers = nn.ModuleList(HeadLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer = LastHeadLayer(config)


class Timesteps(nn.Module):
    """Cosines and sines of a timestep at many frequencies, in float32."""

    def __init__(self, config):
        super().__init__()
        half = config.frequency_embedding_size // 2
        powers = torch.arange(half, dtype=torch.float32) / half
        freq = torch.exp(-math.log(config.diffusion_max_period) * powers)
        self.register_buffer("freq", freq, persistent=False)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(timesteps.float(), self.freq)
        return torch.cat([angles.cos(), angles.sin()], -1)


class TimestepNetwork(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.frequency_embedding_size, config.hidden_size, bias=False)
        self.fc2, self.activation_fn = Linear(config.hidden_size, config.hidden_size, bias=False), activation(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class HeadLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ffn, self.norm = GatedNetwork(config), Norm(config.hidden_size, config.rms_norm_eps)
        self.linear = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)


class LastHeadLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rms_norm_eps = config.rms_norm_eps
        self.linear_1 = Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.linear_2 = Linear(config.hidden_size, config.latent_size, bias=False)


# The convolution towers of the vocoder and the voice encoder


class Encoder(nn.Module):
    """Samples to latents or features, by an ``encoder_config`` or the ``semantic_model_config``."""

    def __init__(self, config):
        super().__init__()
        widths = [config.num_filters * 2**i for i in range(len(config.depths))]
        stages = zip(widths[:-1], widths[1:], config.downsampling_ratios, config.depths[1:], strict=True)
        self.stem = Stem(config, config.channels, widths[0], config.depths[0])
        self.conv_layers = nn.ModuleList(Downsampling(config, *stage) for stage in stages)
        self.head = Causal(widths[-1], config.hidden_size, config.kernel_size)


class Decoder(nn.Module):
    """Latents to samples, by a ``decoder_config``."""

    def __init__(self, config):
        super().__init__()
        widths = [config.num_filters * 2**i for i in reversed(range(len(config.depths)))]
        stages = zip(widths[:-1], widths[1:], config.upsampling_ratios, config.depths[1:], strict=True)
        self.stem = Stem(config, config.hidden_size, widths[0], config.depths[0])
        self.conv_layers = nn.ModuleList(Upsampling(config, *stage) for stage in stages)
        self.head = Causal(widths[-1], config.channels, config.kernel_size)


class Stem(nn.Module):
    def __init__(self, config, inputs: int, width: int, depth: int):
        super().__init__()
        self.conv = Causal(inputs, width, config.kernel_size)
        self.stage = nn.ModuleList(Block(config, width) for _ in range(depth))


class Downsampling(nn.Module):
    def __init__(self, config, inputs: int, width: int, ratio: int, depth: int):
        super().__init__()
        self.conv = Causal(inputs, width, 2 * ratio, stride=ratio)
        self.stage = nn.ModuleList(Block(config, width) for _ in range(depth))


class Upsampling(nn.Module):
    def __init__(self, config, inputs: int, width: int, ratio: int, depth: int):
        super().__init__()
        self.convtr = CausalTransposed(inputs, width, ratio)
        self.stage = nn.ModuleList(Block(config, width) for _ in range(depth))


class Causal(nn.Module):
    """A causal convolution; ``left_pad``: the number of past samples that it sees."""

    def __init__(self, inputs: int, outputs: int, width: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv, self.left_pad = Convolution(inputs, outputs, width, stride, groups=groups), width - stride


class CausalTransposed(nn.Module):
    """A transposed convolution of kernel 2r and stride r."""

    def __init__(self, inputs: int, outputs: int, ratio: int):
        super().__init__()
        self.convtr, self.stride = Transposed(inputs, outputs, 2 * ratio, ratio), ratio


class Block(nn.Module):
    """A ConvNeXt layer."""

    def __init__(self, config, width: int):
        super().__init__()
        self.norm, self.ffn_norm = Norm(width, config.rms_norm_eps), Norm(width, config.rms_norm_eps)
        self.ffn = BlockNetwork(config, width)
        self.gamma, self.ffn_gamma = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.mixer = Causal(width, width, config.kernel_size, groups=width)


class BlockNetwork(nn.Module):
    def __init__(self, config, width: int):
        super().__init__()
        inner = config.ffn_expansion * width
        self.linear1, self.linear2, self.activation = Linear(width, inner), Linear(inner, width), activation(config)
