"""The diffusion decoder: noise and a frame's two conditions become its acoustic latent."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from harness import wire
from harness.vibevoice.kernels.cuda_graphs import Graphs, Input
from harness.vibevoice.kernels.rows import rows_on
from harness.vibevoice.stages.presets import Weights

_TRAINED_STEPS = 1000


class DiffusionStage:
    """Batch in, batch out, without sessions: DPM-Solver++ (2M) with classifier-free guidance.

    The solver is linear in its inputs, so its update of step i is three numbers taken once from the scheduler:
    x[i+1] = a[i] x[i] + b[i] x0[i] + c[i] x0[i-1], with x0 = alpha x - sigma v (v-prediction); Lu et al.,
    arXiv 2211.01095, algorithm 2.
    """

    def __init__(self, weights: Weights):
        self.head = Head(weights.diffusion_head())
        self.compiled = weights.compiled("head.CompiledHead", self.head)
        self.device, self.dtype = weights.device, weights.dtype
        if self.device.type == "cuda":
            self._warm_up()
        self.graphs = None
        if weights.graph_batch:
            self.graphs = Graphs(
                self._graphed, self.graph_inputs(), self.device, weights.graph_batch, (wire.DEFAULT_DIFFUSION_STEPS,)
            )

    @torch.inference_mode()
    def denoise(
        self, condition: torch.Tensor, noise: torch.Tensor, guidance: torch.Tensor, steps: list[int]
    ) -> torch.Tensor:
        """Denoise frames -> latent [N, 64]; rows with the same number of steps form one batch.

        condition [N, 2, hidden] (with, without the prompt), noise [N, 64], guidance [N, 1] and the number of steps per
        row.
        """
        counts = sorted(set(steps))
        if len(counts) == 1:
            return self._denoise(condition, noise, guidance, counts[0])
        latent = torch.empty(noise.shape)
        for count in counts:
            rows = [i for i, own in enumerate(steps) if own == count]
            latent[rows] = self._denoise(condition[rows], noise[rows], guidance[rows], count)
        return latent

    def _denoise(self, condition, noise, guidance, steps: int) -> torch.Tensor:
        if self.compiled:
            timesteps, updates = solver_updates(steps)
            times = self.head.times_of(timesteps).flatten().numpy()
            return self.compiled.denoise(condition, noise, guidance, times, np.array(updates, np.float32))
        if self.graphs and steps == wire.DEFAULT_DIFFUSION_STEPS:
            replayed = self.graphs(condition, noise, guidance, variant=steps)
            if replayed is not None:
                return replayed[0].cpu()
        given = condition.to(self.device), noise.to(self.device), guidance.to(self.device)
        return self._graphed(*given, steps)[0].cpu()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compile the kernels, in seconds, so that no frame waits for it. Raises as ``ragged.compiling``."""
        from harness.vibevoice.kernels.ragged import compiling

        with compiling(self.device):
            self._graphed(*(torch.zeros(1, *each.sizes, device=self.device) for each in self.graph_inputs()), 1)

    def graph_inputs(self) -> tuple[Input, ...]:
        """Conditions, noise and guidance of a row, as ``_graphed`` takes them."""
        return Input((2, self.head.conditions)), Input((wire.LATENT_SIZE,)), Input((1,))

    def _graphed(self, condition, noise, guidance, steps: int) -> tuple[torch.Tensor]:
        """``denoise`` on the device, for rows with one number of steps."""
        both = condition.to(self.dtype).transpose(0, 1).reshape(2 * len(noise), -1)
        return (self.compute(both, noise, guidance, steps),)

    def compute(self, condition: torch.Tensor, noise: torch.Tensor, guidance: torch.Tensor, steps: int) -> torch.Tensor:
        """``denoise`` on the device alone: condition [2N, hidden], noise [N, 64] and guidance [N, 1] in float32.

        The solver runs in float32 whatever the head's dtype: it adds many small updates to one state.
        """
        timesteps, updates = solver_updates(steps)
        x, rounded, before = noise, noise.to(self.dtype), None
        modulations = self.head.modulations(condition, timesteps)
        for modulation, update in zip(modulations, updates, strict=True):
            velocity = self.head(rounded, modulation)
            x, before, rounded = self.head.rows.solve(x, velocity, guidance, before, update, self.dtype)
        return x


class Head:
    """The released diffusion head; what does not depend on x is computed once for all steps of a frame."""

    def __init__(self, head: nn.Module):
        self.head, self.hidden = head, head.cond_proj.out_features
        self.conditions = head.cond_proj.in_features
        self.gate_and_up = [torch.cat([each.ffn.gate_proj.weight, each.ffn.up_proj.weight]) for each in head.layers]
        every = [*(each.linear.weight for each in head.layers), head.final_layer.linear_1.weight]
        self.modulation = torch.cat(every)  # rows: shift, scale, gate of each layer; shift, scale of the last
        is_scale = torch.tensor([*[0, 1, 0] * len(head.layers), 0, 1], device=self.modulation.device)
        self.added = is_scale.to(self.modulation.dtype).repeat_interleave(self.hidden)
        self.times: dict[int, torch.Tensor] = {}
        self.rows = rows_on(self.modulation.device)

    def modulations(self, condition: torch.Tensor, timesteps: list[float]) -> list[tuple[torch.Tensor, ...]]:
        """condition [rows, hidden] -> for each step, the shift, scale (1 added) and gate of its layers."""
        steps, layers = len(timesteps), len(self.head.layers)
        mixed = functional.silu(self.head.cond_proj(condition) + self.times_of(timesteps))
        parts = functional.linear(mixed, self.modulation, self.added)
        parts = parts.view(steps, len(condition), 3 * layers + 2, self.hidden)
        return [step.unbind(1) for step in parts.unbind()]

    def __call__(self, x: torch.Tensor, modulation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """x [N, 64], the same for both branches -> velocity [2N, 64]."""
        hidden, gating, delta = self.head.noisy_images_proj(x), None, None
        for i, layer in enumerate(self.head.layers):
            norm = layer.norm.weight, layer.norm.variance_epsilon
            hidden, modulated = self.rows.modulate(hidden, gating, delta, *norm, *modulation[3 * i : 3 * i + 2])
            gated = self.rows.gate(functional.linear(modulated, self.gate_and_up[i]), layer.ffn.act_fn)
            gating, delta = modulation[3 * i + 2], layer.ffn.down_proj(gated)
        last = self.head.final_layer
        _, modulated = self.rows.modulate(hidden, gating, delta, None, last.rms_norm_eps, *modulation[-2:])
        return last.linear_2(modulated)

    def times_of(self, timesteps: list[float]) -> torch.Tensor:
        """The embedded timesteps [steps, 1, hidden], kept for each number of steps."""
        steps = len(timesteps)
        if steps not in self.times:
            like = self.modulation
            given = torch.tensor(timesteps, device=like.device, dtype=torch.float32)  # bfloat16 cannot represent 999
            embedded = self.head.timestep_embedding(given).to(like.dtype)
            self.times[steps] = self.head.timestep_proj(embedded)[:, None]
        return self.times[steps]


@lru_cache
def solver_updates(steps: int) -> tuple[list[float], list[tuple[float, ...]]]:
    """Timesteps, and (alpha, sigma, a, b, c) for each, of the released scheduler."""
    timesteps, sigmas = _schedule(steps)
    alpha = (1 + sigmas**2).rsqrt()
    sigma = sigmas * alpha
    lam = torch.log(alpha) - torch.log(sigma)  # the last one is infinite: sigma reaches 0
    updates = []
    for i in range(steps):
        a = sigma[i + 1] / sigma[i]
        gain = -alpha[i + 1] * torch.expm1(-(lam[i + 1] - lam[i]))
        second_order = 0 < i < steps - 1  # the last step ends at sigma 0, where only the first order is defined
        r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i]) if second_order else torch.tensor(torch.inf)
        b, c = gain * (1 + 0.5 / r), -gain * 0.5 / r
        updates.append(tuple(float(value) for value in (alpha[i], sigma[i], a, b, c)))
    return timesteps, updates


def _schedule(steps: int) -> tuple[list[float], torch.Tensor]:
    """Timesteps and sigmas [steps + 1] of diffusers' DPMSolverMultistepScheduler("squaredcos_cap_v2"), v-prediction.

    Nichol and Dhariwal, arXiv 2102.09672, equation 17. Reimplemented because importing diffusers takes seconds.
    """
    share = np.cos((np.arange(_TRAINED_STEPS + 1) / _TRAINED_STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - share[1:] / share[:-1], 0.999).astype(np.float32)
    kept = torch.cumprod(1 - torch.from_numpy(betas), 0).numpy()
    at = np.linspace(0, _TRAINED_STEPS - 1, steps + 1).round()[:0:-1].astype(int)
    sigmas = np.append(np.sqrt((1 - kept[at]) / kept[at]), np.float32(0))
    return [float(t) for t in at], torch.from_numpy(sigmas).double()
