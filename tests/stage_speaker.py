"""The stages as a frame loop without Triton: several sessions that speak frames only, in one batch."""

import torch
from stage_sessions import NO_VOICE_FRAMES

from harness import wire
from harness.vibevoice.entry.prompt import prompt_chunks
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.vocoder import VocoderStage


class Speaker:
    """The stages as a frame loop without Triton; several sessions step together."""

    def __init__(self, weights):
        self.llm, self.diffusion, self.vocoder = LLMStage(weights), DiffusionStage(weights), VocoderStage(weights)
        self.feedback = {}
        self.audio = {}

    def open(self, session, token_ids, frames, voice_frames=NO_VOICE_FRAMES, parts=1, start_frame=0):
        self.llm.open(session, len(token_ids), start_frame + frames, start_frame)
        size = -(-len(token_ids) // parts)
        to_read = [] if start_frame else token_ids.tolist()
        for part, places in prompt_chunks(to_read, size, self.llm.config.audio_token_id):
            self.llm.prefill(session, torch.tensor(part), voice_frames[places])
        self.vocoder.open(session)
        self.feedback[session] = torch.zeros(64), torch.zeros(128)
        self.audio[session] = []

    def step(self, noise):
        """``noise``: session -> [64]; these sessions speak one frame in one batch."""
        ids = list(noise)
        latent, semantic = (torch.stack([self.feedback[i][k] for i in ids]) for k in (0, 1))
        condition, token = self.llm.step(ids, latent, semantic)
        guidance = torch.full((len(ids), 1), wire.DEFAULT_GUIDANCE_SCALE)
        steps = [wire.DEFAULT_DIFFUSION_STEPS] * len(ids)
        latent = self.diffusion.denoise(condition, torch.stack(list(noise.values())), guidance, steps)
        audio, semantic = self.vocoder.step(ids, latent, token)
        for row, i in enumerate(ids):
            self.feedback[i] = latent[row], semantic[row]
            self.audio[i].append(audio[row])

    def close(self, session):
        self.llm.close(session)
        self.vocoder.close(session)
