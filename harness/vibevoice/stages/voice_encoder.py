"""The voice encoder: turns a voice sample into the acoustic frames that represent it in the prompt."""

from __future__ import annotations

import torch

from harness import wire
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.towers import Tower


class VoiceStage:
    """Waveforms to acoustic frames, in the diffusion head's scale."""

    def __init__(self, weights: Weights):
        self.encoder = Tower(weights.acoustic_encoder())
        self.scale, self.bias = weights.latent_scale_and_bias()
        self.device, self.dtype = weights.device, weights.dtype

    @torch.inference_mode()
    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        """waveform [samples] -> acoustic frames [ceil(samples / 3200), 64]."""
        return self.compute(waveform.to(self.device)).cpu()

    def compute(self, waveform: torch.Tensor) -> torch.Tensor:
        """``encode`` on the device alone."""
        short = -len(waveform) % wire.SAMPLES_PER_FRAME
        padded = torch.nn.functional.pad(waveform.to(self.dtype), (0, short))
        silence = torch.zeros(self.encoder.state_size, 1, device=self.device, dtype=self.dtype)
        latents, _ = self.encoder(padded[None, :, None], silence)
        return (latents[:, :, 0].t().float() + self.bias) * self.scale
