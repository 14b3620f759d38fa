"""The two connectors that feed a frame back to the LLM, compiled: a row's sums do not depend on the rows beside it.

torch's products choose another order of sums for another number of rows, so that a session's audio would differ in its
last bits with the sessions that happen to be stepped with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from harness.jit import kept
from harness.vibevoice.compiled.lanes import SOURCES
from harness.vibevoice.compiled.pack import Pack, rounded
from harness.vibevoice.compiled.products import normed, product, whole

# Offsets of a connector's weights: first product and its bias, epsilon of the norm, second product and its bias.
IN, IN_BIAS, EPSILON, OUT, OUT_BIAS = range(5)
CONNECTOR_FIELDS = 5


class CompiledConnectors:
    """``connectors(latent [N, 64], semantic [N, 128]) -> embeds [N, hidden]``: the sum of both connectors."""

    def __init__(self, plain: tuple[nn.Module, nn.Module]):
        pack, at = Pack(), []
        for each in plain:
            first, norm, second = each.linear_1, each.act, each.linear_2
            at += [pack.matrix(first.weight), pack.add(first.bias), pack.add(norm.variance_epsilon)]
            at += [pack.matrix(second.weight * norm.weight), pack.add(second.bias)]
        self.at, self.weights = np.array(at), pack.array()
        self.hidden = plain[0].linear_2.out_features
        self.inputs = tuple(each.linear_1.in_features for each in plain)
        # Compiles, or reads from disk, before the first frame.
        self(*(torch.zeros(1, size) for size in self.inputs))

    def __call__(self, latent: torch.Tensor, semantic: torch.Tensor) -> torch.Tensor:
        rows = len(latent)
        ld = rounded(rows, 8)
        made, normal, embeds = (np.zeros(self.hidden * ld, np.float32) for _ in range(3))
        for number, given in enumerate((latent, semantic)):
            x = np.zeros((self.inputs[number], ld), np.float32)
            x[:, :rows] = given.t().numpy()
            of = self.at[number * CONNECTOR_FIELDS : (number + 1) * CONNECTOR_FIELDS]
            _connect(
                SOURCES, of, self.weights, x.reshape(-1), self.inputs[number], self.hidden, made, normal, embeds, rows
            )
        return torch.from_numpy(embeds.reshape(self.hidden, ld)[:, :rows].T.copy())


@kept
def _connect(sources, at, w, x, inputs, hidden, made, normal, embeds, rows):
    """Add a connector of x [inputs, rows] to embeds [hidden, rows]; the others are working memory."""
    ld = whole(rows)
    product(w, at[IN], at[IN_BIAS], hidden, x, 0, ld, inputs, 1, 0, made, 0, ld, rows, False)
    normed(made, 0, ld, hidden, w[at[EPSILON]], normal, 0, ld, rows)
    product(w, at[OUT], at[OUT_BIAS], hidden, normal, 0, ld, hidden, 1, 0, embeds, 0, ld, rows, True)
