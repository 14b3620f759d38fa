"""Lower bound of a stage's time from the model's shapes (roofline).

Williams, Waterman and Patterson, "Roofline", CACM 52 (2009): time = max(bytes / bandwidth, operations / throughput).
Weights count once per pass, plus KV cache and convolution state; activations are assumed to stay on the chip. The
operations are those of the weights' shapes; tests/vibevoice/test_networks.py compares them with what torch counts in
the released modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from harness import wire
from harness.vibevoice.stages import networks
from harness.vibevoice.stages.configuration import ModelConfig

LEGAL_TOKENS = 4  # rows of the output matrix that are ever needed


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations (a multiplication and an addition are two)."""

    bytes: float
    operations: float

    def floor_ms(self, bandwidth_gb_s: float, tflop_s: float) -> float:
        """Lower bound in milliseconds on a device of this bandwidth and throughput."""
        return 1e3 * max(self.bytes / (bandwidth_gb_s * 1e9), self.operations / (tflop_s * 1e12))

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Part:
    """A network: its parameters, and its operations for one row (a position, a frame)."""

    parameters: int
    operations: float

    def cost(self, rows: int, itemsize: int) -> Cost:
        """Cost of running the network over ``rows`` at once: weights once, operations per row."""
        return Cost(self.parameters * itemsize, rows * self.operations)


class Roofline:
    """The costs of every stage for one model configuration; ``itemsize`` is bytes per number (2 for bfloat16)."""

    def __init__(self, config: ModelConfig, itemsize: int):
        text, self.itemsize = config.text_config, itemsize
        head_size = text.hidden_size // text.num_attention_heads
        self.kv_bytes_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * itemsize
        # Query times key and weights times value, for every query head and layer, per attended position.
        self.attention_operations = 4 * text.num_hidden_layers * text.hidden_size
        with torch.device("meta"):
            self.backbone = _backbone(text)
            self.connectors = _connectors(config)
            self.head = _diffusion_head(config)
            self.decoder = _tower(networks.Decoder(config.audio_config.decoder_config), 1)
            encoders = config.semantic_model_config, config.audio_config.encoder_config
            self.semantic_encoder, self.acoustic_encoder = (
                _tower(networks.Encoder(each), wire.SAMPLES_PER_FRAME) for each in encoders
            )
        self.embeddings = Part(text.vocab_size * text.hidden_size, 0.0)  # looked up, not multiplied
        self.legal_rows = Part(LEGAL_TOKENS * text.hidden_size, 2 * LEGAL_TOKENS * text.hidden_size)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all stages, each stage once."""
        towers = self.decoder, self.semantic_encoder, self.acoustic_encoder
        parts = self.backbone, self.embeddings, self.connectors, self.head, *towers
        return self.itemsize * sum(part.parameters for part in parts)

    def step(self, batch: int, context: int) -> Cost:
        """A frame step of the LLM: ``batch`` sessions, each with ``context`` positions in its two branches together."""
        networks = self.backbone.cost(2 * batch, self.itemsize)
        for part in (self.connectors, self.legal_rows):
            networks += part.cost(batch, self.itemsize)
        return networks + self._attention(batch * context, written=2 * batch, pairs=batch * context)

    def prefill(self, tokens: int, context: int) -> Cost:
        """A prompt part of ``tokens`` after ``context`` positions of the same prompt."""
        pairs = tokens * context + tokens * (tokens + 1) // 2
        return self.backbone.cost(tokens, self.itemsize) + self._attention(context, tokens, pairs)

    def denoise(self, batch: int, steps: int) -> Cost:
        """``steps`` passes of the diffusion head over both branches of ``batch`` frames."""
        one = self.head.cost(2 * batch, self.itemsize)
        return Cost(steps * one.bytes, steps * one.operations)

    def vocode(self, batch: int, state_values: int) -> Cost:
        """A frame of ``batch`` sessions through decoder and semantic encoder, whose state is read and written."""
        networks = self.decoder.cost(batch, self.itemsize) + self.semantic_encoder.cost(batch, self.itemsize)
        return networks + Cost(2 * batch * state_values * self.itemsize, 0)

    def encode(self, frames: int) -> Cost:
        """A voice sample of this many frames of 3,200 samples."""
        return self.acoustic_encoder.cost(frames, self.itemsize)

    def _attention(self, read: int, written: int, pairs: int) -> Cost:
        return Cost((read + written) * self.kv_bytes_per_token, pairs * self.attention_operations)


def _backbone(text) -> Part:
    network = networks.Qwen2(text)
    embeddings = network.embed_tokens.weight.numel()
    return Part(_parameters(network) - embeddings, _linear_operations(network))


def _connectors(config: ModelConfig) -> Part:
    hidden = config.text_config.hidden_size
    inputs = config.audio_config.hidden_size, config.semantic_model_config.hidden_size
    both = nn.ModuleList(networks.Connector(size, hidden) for size in inputs)
    return Part(_parameters(both), _linear_operations(both))


def _diffusion_head(config: ModelConfig) -> Part:
    network = networks.DiffusionHead(config.diffusion_head_config)
    return Part(_parameters(network), _linear_operations(network))


def _tower(network: networks.Decoder | networks.Encoder, positions: int) -> Part:
    """A tower that takes so many positions for a frame: latents, or samples."""
    operations = _weights(network.stem) * positions
    for layer in network.conv_layers:
        if isinstance(layer, networks.Upsampling):
            operations += layer.convtr.convtr.weight.numel() * positions
            positions *= layer.convtr.stride
        else:
            positions //= layer.conv.conv.stride[0]
            operations += layer.conv.conv.weight.numel() * positions
        operations += _weights(layer.stage) * positions
    return Part(_parameters(network), 2.0 * (operations + _weights(network.head) * positions))


def _weights(network: nn.Module) -> int:
    """Numbers of a network that every position is multiplied with: of its products and convolutions of stride 1."""
    kinds = nn.Linear | nn.Conv1d
    return sum(one.weight.numel() for one in network.modules() if isinstance(one, kinds))


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _linear_operations(network: nn.Module) -> float:
    return 2.0 * sum(one.weight.numel() for one in network.modules() if isinstance(one, nn.Linear))
