"""The diffusion decoder: noise and the two conditions of a frame become its acoustic latent."""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers import DPMSolverMultistepScheduler

from harness.vibevoice.presets import Weights


class DiffusionStage:
    """Batch in, batch out, without sessions: DPM-Solver++ (2M) with classifier-free guidance.

    The solver is linear in its inputs, so its update of step i is three numbers taken once from the scheduler:
    x[i+1] = a[i] x[i] + b[i] x0[i] + c[i] x0[i-1], with x0 = alpha x - sigma v (v-prediction); Lu et al.,
    arXiv 2211.01095, algorithm 2.
    """

    def __init__(self, weights: Weights):
        self.head = weights.diffusion_head()
        self.device, self.dtype = weights.device, weights.dtype

    @torch.inference_mode()
    def denoise(
        self, condition: torch.Tensor, noise: torch.Tensor, guidance: torch.Tensor, steps: list[int]
    ) -> torch.Tensor:
        """Condition [N, 2, hidden] (with, without the prompt), noise [N, 64], guidance [N, 1], a number of steps per
        row -> latent [N, 64]."""
        latent = torch.empty_like(noise)
        for count in sorted(set(steps)):
            rows = [i for i, own in enumerate(steps) if own == count]
            latent[rows] = self._denoise(condition[rows], noise[rows], guidance[rows], count)
        return latent

    def _denoise(self, condition, noise, guidance, steps: int) -> torch.Tensor:
        count = len(noise)
        both = condition.to(self.device, self.dtype).transpose(0, 1).reshape(2 * count, -1)
        x = noise.to(self.device, self.dtype)
        guidance = guidance.to(self.device, self.dtype)
        before = torch.zeros_like(x)
        timesteps, updates = solver_updates(steps)
        for timestep, (alpha, sigma, a, b, c) in zip(timesteps, updates, strict=True):
            velocity = self.head(x.repeat(2, 1), x.new_full((2 * count,), timestep), both)
            guided = velocity[count:] + guidance * (velocity[:count] - velocity[count:])
            x0 = alpha * x - sigma * guided
            x = a * x + b * x0 + c * before
            before = x0
        return x.float()


@lru_cache
def solver_updates(steps: int) -> tuple[list[float], list[tuple[float, ...]]]:
    """Timesteps, and (alpha, sigma, a, b, c) for each, from the released scheduler's own noise schedule."""
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    alpha = (1 + sigmas**2).rsqrt()
    sigma = sigmas * alpha
    lam = torch.log(alpha) - torch.log(sigma)  # the last one is infinite: sigma reaches 0
    updates = []
    for i in range(steps):
        a = sigma[i + 1] / sigma[i]
        gain = -alpha[i + 1] * torch.expm1(-(lam[i + 1] - lam[i]))
        second_order = 0 < i < steps - 1  # the last one ends at sigma 0, where only the first order is defined
        r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i]) if second_order else torch.tensor(torch.inf)
        b, c = gain * (1 + 0.5 / r), -gain * 0.5 / r
        updates.append(tuple(float(value) for value in (alpha[i], sigma[i], a, b, c)))
    return [float(t) for t in scheduler.timesteps], updates
