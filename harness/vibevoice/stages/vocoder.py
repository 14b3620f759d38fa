"""The neural vocoder: turns a frame's latent into 3,200 samples, and semantic features that feed the next frame."""

from __future__ import annotations

import torch

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.kernels.cuda_graphs import Graphs, Input
from harness.vibevoice.sessions.table import Sessions
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.towers import Tower


class VocoderStage:
    """Sessions of the acoustic decoder and the semantic encoder, stepped together in one batch."""

    def __init__(self, weights: Weights):
        self.decoder, self.encoder = Tower(weights.acoustic_decoder()), Tower(weights.semantic_encoder())
        self.compiled = [weights.compiled("towers.CompiledTower", tower) for tower in (self.decoder, self.encoder)]
        self.scale, self.bias = weights.latent_scale_and_bias()
        self.device, self.dtype = weights.device, weights.dtype
        self.sizes = (self.decoder.state_size, self.encoder.state_size)
        self.sessions: Sessions[torch.Tensor] = Sessions(wire.VOCODER)  # the state of each, [state_size]
        self.graphs = None
        if weights.graph_batch:
            self.graphs = Graphs(self._graphed, self.graph_inputs(), self.device, weights.graph_batch)

    @property
    def state_size(self) -> int:
        """Number of values of a session's convolution state."""
        return sum(self.sizes)

    def open(self, session_id: int, state: torch.Tensor | None = None) -> None:
        """Start a session from silence, or from the final ``state`` [state_size] of another one.

        Raises RequestError for a state of another size.
        """
        if state is None:
            state = torch.zeros(self.state_size)
        if len(state) != self.state_size:
            raise RequestError(f"a convolution state has {len(state)} values where this model holds {self.state_size}")
        self.sessions.open(session_id, state.to(self.device, self.dtype, copy=True))

    def close(self, session_id: int) -> torch.Tensor:
        """End a session; returns its state [state_size] in float32, empty for an unknown session."""
        state = self.sessions.close(session_id)
        return torch.empty(0) if state is None else state.float().cpu()

    @torch.inference_mode()
    def step(
        self, session_ids: list[int], latent: torch.Tensor, token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latent [N, 64], token [N] -> audio [N, 3200], semantic [N, 128]; rows without a speech frame stay zero.

        A row whose token is not "speech frame" leaves its session's convolution state as it was.
        """
        rows = [i for i, t in enumerate(token.tolist()) if t == wire.TOKEN_SPEECH_FRAME]
        if len(rows) == len(session_ids):
            return self._advance([self.sessions.get(session) for session in session_ids], latent)
        audio = torch.zeros(len(session_ids), wire.SAMPLES_PER_FRAME)
        semantic = torch.zeros(len(session_ids), wire.SEMANTIC_SIZE)
        if rows:
            states = [self.sessions.get(session_ids[i]) for i in rows]
            audio[rows], semantic[rows] = self._advance(states, latent[rows])
        return audio, semantic

    def _advance(self, states: list[torch.Tensor], latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One frame of each session; ``states`` are changed in place."""
        if all(self.compiled):
            decoder, encoder = self.compiled
            audio = decoder(self._scaled(latent), [state[: self.sizes[0]] for state in states])
            semantic = encoder(audio, [state[self.sizes[0] :] for state in states])
            return audio[0].t().contiguous(), semantic[:, 0].t().contiguous()
        given = latent, torch.stack(states)
        answer = self.graphs(*given) if self.graphs else None
        audio, semantic, after = answer or self._graphed(latent.to(self.device), given[1], 0)
        answer = audio.cpu(), semantic.cpu()
        # last: where anything before fails, each session is stepped again separately
        torch._foreach_copy_(states, after.unbind())
        return answer

    def graph_inputs(self) -> tuple[Input, ...]:
        """Latent and state of a session, as ``_graphed`` takes them."""
        return Input((wire.LATENT_SIZE,)), Input((self.state_size,), self.dtype, on_device=True)

    def _graphed(self, latent, states, _) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``compute`` with one row per session: states [N, state_size]."""
        audio, semantic, after = self.compute(latent, states.t().contiguous())
        return audio.contiguous(), semantic.contiguous(), after.t().contiguous()

    def compute(self, latent: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A frame on the device alone -> audio [N, 3200], semantic [N, 128] in float32, and the next state.

        latent [N, 64] in float32, state [state_size, N].
        """
        decoder, encoder = state.split(self.sizes)
        audio, decoder = self.decoder(self._scaled(latent), decoder)
        semantic, encoder = self.encoder(audio, encoder)
        return audio[0].t().float(), semantic[:, 0].t().float(), torch.cat([decoder, encoder])

    def _scaled(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents [N, 64] in the decoder's scale and layout: [64, 1, N]."""
        return (latent / self.scale - self.bias).to(self.dtype).t().unsqueeze(1)
