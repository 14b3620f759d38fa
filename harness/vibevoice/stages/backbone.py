"""The Qwen2 backbone over tokens of many sequences at once; attention is left to the caller's KV cache.

The arithmetic is that of transformers' ``Qwen2Model``, whose weights it takes, in fewer operations: projections with
the same input are one product, and rotation handles queries and keys together.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from harness.vibevoice.kernels.rows import rows_on


class KVCache(Protocol):
    """Stores the keys and values of a call's tokens, and computes their attention."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [tokens, heads, size], key and value [tokens, KV heads, size] -> [tokens, heads x size]."""
        ...


class Backbone:
    """``backbone(embeds [tokens, hidden], positions [tokens], kv) -> hidden [tokens, hidden]`` after the last norm."""

    def __init__(self, model: nn.Module):
        config = model.config
        self.embed_tokens, self.norm = model.embed_tokens, model.norm
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.frequencies = model.rotary_emb.inv_freq
        if self.frequencies.dtype != torch.float32:  # rounding would turn late positions by radians
            raise TypeError(f"rotary frequencies in {self.frequencies.dtype}: convert a module's parameters only")
        self.rows = rows_on(self.frequencies.device)
        self.layers = [_Layer(layer, self.heads + self.kv_heads, self.kv_heads, self.size) for layer in model.layers]

    def __call__(self, embeds: torch.Tensor, positions: torch.Tensor, kv: KVCache) -> torch.Tensor:
        angles = self.rows.angles(positions, self.frequencies, embeds.dtype)
        x, delta = embeds, None
        for index, layer in enumerate(self.layers):
            x, delta = layer(index, x, delta, angles, kv, self.rows)
        return self.rows.add_norm(x, delta, self.norm.weight, self.norm.variance_epsilon)[1]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compute a single position: on a GPU, the first call compiles kernels, which takes seconds."""
        like = self.embed_tokens.weight
        self(like.new_zeros(1, like.shape[1]), torch.zeros(1, dtype=torch.long, device=like.device), NoCache())


class NoCache:
    """Attention of each token to itself only: for compiling a backbone without sessions."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query.flatten(1)


class _Layer:
    def __init__(self, layer: nn.Module, turned_heads: int, kv_heads: int, size: int):
        attention, network = layer.self_attn, layer.mlp
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv, self.qkv_bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        self.out = attention.o_proj
        self.gate_and_up = torch.cat([network.gate_proj.weight, network.up_proj.weight])
        self.down, self.activation = network.down_proj, network.act_fn
        self.norm, self.feed_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.turned_heads, self.kv_heads, self.size = turned_heads, kv_heads, size

    def __call__(
        self, index: int, x: torch.Tensor, delta: torch.Tensor | None, angles: tuple, kv: KVCache, rows: ModuleType
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input x + delta [tokens, hidden]; the output has the same form, to be added in the next layer's norm."""
        x, normed = rows.add_norm(x, delta, self.norm.weight, self.norm.variance_epsilon)
        made = functional.linear(normed, self.qkv, self.qkv_bias).view(len(x), -1, self.size)
        turned, value = rows.turn(made, angles, self.turned_heads), made[:, self.turned_heads :]
        query, key = turned.split((self.turned_heads - self.kv_heads, self.kv_heads), 1)
        attended = self.out(kv.attend(index, query, key, value))
        x, normed = rows.add_norm(x, attended, self.feed_norm.weight, self.feed_norm.variance_epsilon)
        gated = rows.gate(functional.linear(normed, self.gate_and_up), self.activation)
        return x, self.down(gated)
