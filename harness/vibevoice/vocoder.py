"""The neural vocoder: a frame's latent becomes 3,200 samples, and the semantic features that feed the next frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.presets import Weights
from harness.vibevoice.sessions import Sessions


class StateLayout:
    """Where each causal convolution of a network keeps its past samples in one flat row per session."""

    def __init__(self, network: nn.Module):
        self.places: dict[str, tuple[int, int, int]] = {}  # cache key -> offset, channels, samples of past
        self.size = 0
        for module in network.modules():
            key = getattr(module, "cache_key", None)
            if key is not None:
                self.places[key] = (self.size, module.in_channels, module.left_pad)
                self.size += module.in_channels * module.left_pad


class BatchState:
    """A batch of rows in a StateLayout, in the shape of transformers' padding cache (``update`` is its protocol)."""

    def __init__(self, layout: StateLayout, past: torch.Tensor):
        self.layout = layout
        self.past = past  # [N, size]
        self.new = torch.empty_like(past)

    def update(self, hidden: torch.Tensor, cache_key: str, conv: nn.Module) -> torch.Tensor:
        offset, channels, length = self.layout.places[cache_key]
        if length == 0:
            return hidden
        place = slice(offset, offset + channels * length)
        padded = torch.cat([self.past[:, place].view(-1, channels, length), hidden], dim=-1)
        self.new[:, place].view(-1, channels, length).copy_(padded[..., -length:])
        return padded


@dataclass
class _Session:
    decoder: torch.Tensor
    encoder: torch.Tensor


class VocoderStage:
    """Sessions of the acoustic decoder and the semantic encoder, stepped together in one batch."""

    def __init__(self, weights: Weights):
        self.decoder = weights.acoustic_decoder()
        self.encoder = weights.semantic_encoder()
        self.scale, self.bias = weights.latent_scale_and_bias()
        self.device, self.dtype = weights.device, weights.dtype
        self.decoder_layout = StateLayout(self.decoder)
        self.encoder_layout = StateLayout(self.encoder)
        self.sessions: Sessions[_Session] = Sessions(wire.VOCODER)

    @property
    def state_size(self) -> int:
        """Values of convolution state that a session holds."""
        return self.decoder_layout.size + self.encoder_layout.size

    def open(self, session_id: int, state: torch.Tensor | None = None) -> None:
        """Start a session from silence, or from the ``state`` [state_size] in which another one ended."""
        if state is None:
            state = torch.zeros(self.state_size)
        if len(state) != self.state_size:
            raise RequestError(f"a convolution state has {len(state)} values where this model holds {self.state_size}")
        parts = state.to(self.device, self.dtype).split((self.decoder_layout.size, self.encoder_layout.size))
        self.sessions.open(session_id, _Session(*parts))

    def close(self, session_id: int) -> torch.Tensor:
        """End a session; returns its state [state_size], float32, nothing for a session that is not there."""
        session = self.sessions.close(session_id)
        return torch.empty(0) if session is None else torch.cat([session.decoder, session.encoder]).float().cpu()

    @torch.inference_mode()
    def step(
        self, session_ids: list[int], latent: torch.Tensor, token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latent [N, 64], token [N] -> audio [N, 3200], semantic [N, 128]; rows without a speech frame stay zero.

        A row whose token is not "speech frame" leaves its session's convolution state as it was.
        """
        audio = torch.zeros(len(session_ids), wire.SAMPLES_PER_FRAME)
        semantic = torch.zeros(len(session_ids), wire.SEMANTIC_SIZE)
        rows = [i for i, t in enumerate(token.tolist()) if t == wire.TOKEN_SPEECH_FRAME]
        if rows:
            sessions = [self.sessions.get(session_ids[i]) for i in rows]
            audio[rows], semantic[rows] = self._advance(sessions, latent[rows])
        return audio, semantic

    def _advance(self, sessions: list[_Session], latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = latent.to(self.device, self.dtype) / self.scale - self.bias
        decoder = BatchState(self.decoder_layout, torch.stack([s.decoder for s in sessions]))
        encoder = BatchState(self.encoder_layout, torch.stack([s.encoder for s in sessions]))
        audio = self.decoder(scaled.unsqueeze(-1), padding_cache=decoder).audio
        semantic = self.encoder(audio, padding_cache=encoder).latents
        for row, session in enumerate(sessions):
            session.decoder, session.encoder = decoder.new[row], encoder.new[row]
        return audio[:, 0].float().cpu(), semantic[:, 0].float().cpu()
