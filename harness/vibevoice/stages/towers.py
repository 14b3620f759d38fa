"""The streaming convolution towers of the vocoder: many sessions in one pass, few operations per layer.

The arithmetic is that of transformers' ``VibeVoiceAcousticTokenizer`` modules, whose weights it takes:

- activations are [channels, time, sessions], so that every layer is one matrix product over all sessions;
- gains and norm weights are folded into adjacent weights (they are constants at inference);
- a transposed convolution of kernel 2r and stride r is one product with the present and the previous sample.

Each layer keeps the last samples that it saw of each session: its part of a state [values, sessions].
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class Tower:
    """A decoder or an encoder: ``tower(x, past) -> (y, next state)``; x is [channels, time, sessions]."""

    def __init__(self, network: nn.Module):
        self.layers = list(_layers(network))
        self.sizes = [layer.channels * layer.past for layer in self.layers]
        self.state_size = sum(self.sizes)

    def __call__(self, x: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = torch.empty_like(past)
        for layer, before, after in zip(self.layers, past.split(self.sizes), new.split(self.sizes), strict=True):
            x = layer(x, before, after)
        return x, new


class TableTower:
    """A tower whose sessions' states are rows of a table, of which it uses the columns from ``offset`` on.

    ``tower(x [sessions, time, channels], table, read [sessions], write [sessions]) -> y [sessions, time, channels]``:
    a session's state is read from row ``read``, and the next one written to row ``write``.
    """

    def __init__(self, plain: Tower, offset: int = 0):
        self.plain, self.columns = plain, slice(offset, offset + plain.state_size)

    def __call__(self, x: torch.Tensor, table: torch.Tensor, read: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
        states = table[:, self.columns]
        y, after = self.plain(x.permute(2, 1, 0), states.index_select(0, read).t().contiguous())
        states.index_copy_(0, write, after.t())
        return y.permute(2, 1, 0)


def _layers(network: nn.Module):
    yield StreamingConvolution(network.stem.conv)
    yield from map(StreamingBlock, network.stem.stage)
    for layer in network.conv_layers:
        yield StreamingUpsampling(layer.convtr) if hasattr(layer, "convtr") else StreamingConvolution(layer.conv)
        yield from map(StreamingBlock, layer.stage)
    yield StreamingConvolution(network.head)


def _with_past(x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """x [channels, time, sessions] with ``before`` in front; its last samples are written to ``after``."""
    channels, time, sessions = x.shape
    past = before.view(channels, -1, sessions)
    padded = torch.cat([past, x], 1)
    after.view(channels, -1, sessions).copy_(padded.narrow(1, time, past.shape[1]))
    return padded


def _product(*factors: torch.Tensor) -> torch.Tensor:
    """The product of constants, multiplied in float32 and rounded once, to the type of the first."""
    return math.prod(factor.float() for factor in factors).to(factors[0].dtype)


class _Norm:
    """x [channels, n] / its root mean square over channels, in float32 as the released module computes it."""

    def __init__(self, module: nn.Module):
        like = {"device": module.weight.device, "dtype": torch.float32}
        channels = module.weight.numel()
        self.mean = torch.full((1, channels), 1 / channels, **like)
        self.constant = float(module.variance_epsilon)
        self.epsilon = torch.full((1, 1), self.constant, **like)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.addmm(self.epsilon, self.mean, wide * wide).rsqrt_()).to(x.dtype)


class StreamingBlock:
    """A ConvNeXt layer: depthwise convolution and feed-forward network, each normed, scaled and added."""

    def __init__(self, module: nn.Module):
        convolution, gain = module.mixer.conv, module.gamma
        taps = _product(convolution.weight[:, 0], module.norm.weight[:, None], gain[:, None])
        self.channels, self.past = taps.shape[0], module.mixer.left_pad
        self.norm, self.feed_norm = _Norm(module.norm), _Norm(module.ffn_norm)
        self.taps = [tap[:, None].contiguous() for tap in taps.unbind(1)]
        self.kernel = taps[:, None, :, None].contiguous()
        self.bias = _product(convolution.bias, gain)[:, None]
        first, second = module.ffn.linear1, module.ffn.linear2
        self.activation = module.ffn.activation
        self.up, self.up_bias = _product(first.weight, module.ffn_norm.weight), first.bias[:, None]
        self.down = _product(second.weight, module.ffn_gamma[:, None])
        self.down_bias = _product(second.bias, module.ffn_gamma)[:, None]

    def __call__(self, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        x = x.reshape(self.channels, -1)
        x = self._mixed(x, _with_past(self.norm(x).view(shape), before, after), shape[2])
        inner = self.activation(torch.addmm(self.up_bias, self.up, self.feed_norm(x)))
        return x.add_(self.down_bias).addmm_(self.down, inner).view(shape)

    def _mixed(self, x: torch.Tensor, padded: torch.Tensor, sessions: int) -> torch.Tensor:
        """x + the depthwise convolution: one kernel on a GPU; on a CPU, tap by tap is 1.5 times as fast."""
        mixed = x + self.bias
        if not x.is_cpu:
            return mixed.add_(functional.conv2d(padded[None], self.kernel, groups=self.channels).view(x.shape))
        padded = padded.view(self.channels, -1)
        for i, tap in enumerate(self.taps):
            mixed.addcmul_(padded.narrow(1, i * sessions, x.shape[1]), tap)
        return mixed


class StreamingConvolution:
    """A causal convolution, strided or not."""

    def __init__(self, module: nn.Module):
        weight = module.conv.weight
        outputs, self.channels, self.width = weight.shape
        self.stride, self.past = module.conv.stride[0], module.left_pad
        self.weight, self.bias = weight.reshape(outputs, -1), module.conv.bias[:, None]

    def __call__(self, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        sessions = x.shape[2]
        windows = _with_past(x, before, after).unfold(1, self.width, self.stride)  # [channels, time, sessions, width]
        columns = windows.permute(0, 3, 1, 2).reshape(self.weight.shape[1], -1)
        return torch.addmm(self.bias, self.weight, columns).view(len(self.weight), -1, sessions)


class StreamingUpsampling:
    """A causal transposed convolution of kernel 2r and stride r."""

    past = 1

    def __init__(self, module: nn.Module):
        weight = module.convtr.weight
        self.channels, self.outputs, width = weight.shape
        self.ratio = module.stride
        if width != 2 * self.ratio or module.convtr.bias is None:
            raise NotImplementedError(f"a transposed convolution of kernel {width} and stride {self.ratio}")
        present, previous = (part.permute(2, 1, 0).reshape(-1, self.channels) for part in weight.split(self.ratio, 2))
        self.weight = torch.cat([previous, present], 1)  # [ratio x outputs, 2 x channels]
        self.bias = module.convtr.bias.repeat(self.ratio)[:, None]

    def __call__(self, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        _, time, sessions = x.shape
        previous = torch.cat([before.view(self.channels, -1, sessions), x.narrow(1, 0, time - 1)], 1)
        after.view(self.channels, -1, sessions).copy_(x.narrow(1, time - 1, 1))
        both = torch.cat([previous, x]).view(2 * self.channels, -1)
        made = torch.addmm(self.bias, self.weight, both).view(self.ratio, self.outputs, time, sessions)
        return made.permute(1, 2, 0, 3).reshape(self.outputs, time * self.ratio, sessions)
