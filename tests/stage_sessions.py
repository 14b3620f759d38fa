"""The stages as a frame loop without Triton, driven as the entry drives them."""

from dataclasses import dataclass, field

import torch

from harness import wire
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.vocoder import VocoderStage

FRAME, BEGIN, END, STOP = (
    wire.TOKEN_SPEECH_FRAME,
    wire.TOKEN_SPEECH_BEGIN,
    wire.TOKEN_SPEECH_END,
    wire.TOKEN_END_OF_TEXT,
)
NO_VOICE_FRAMES = torch.empty(0, wire.LATENT_SIZE)


@dataclass
class Talk:
    """One session as the entry drives it: what it was fed, what it said."""

    frames: int
    noise: torch.Tensor
    guidance: float = wire.DEFAULT_GUIDANCE_SCALE
    steps: int = wire.DEFAULT_DIFFUSION_STEPS
    latents: list = field(default_factory=lambda: [torch.zeros(wire.LATENT_SIZE)])  # of step i - 1, as fed to step i
    semantics: list = field(default_factory=lambda: [torch.zeros(wire.SEMANTIC_SIZE)])
    tokens: list = field(default_factory=list)
    audio: list = field(default_factory=list)

    @property
    def ended(self):
        return self.tokens.count(FRAME) == self.frames or STOP in self.tokens

    def heard(self):
        return torch.cat(self.audio) if self.audio else torch.empty(0)


class Stages:
    """The stages as a frame loop without Triton; talks step together."""

    def __init__(self, weights):
        self.llm, self.diffusion, self.vocoder = LLMStage(weights), DiffusionStage(weights), VocoderStage(weights)

    def open(self, session, prompt, frames, state=None, **more):
        self.llm.open(session, len(prompt), frames, **more)
        if not more.get("start_frame"):
            self.llm.prefill(session, prompt, NO_VOICE_FRAMES)
        self.vocoder.open(session, state)

    def step(self, talks):
        ids, these = list(talks), list(talks.values())
        latent, semantic = torch.stack([t.latents[-1] for t in these]), torch.stack([t.semantics[-1] for t in these])
        condition, token = self.llm.step(ids, latent, semantic)
        noise = torch.stack([t.noise[t.tokens.count(FRAME)] for t in these])
        guidance = torch.tensor([[t.guidance] for t in these])
        latent = self.diffusion.denoise(condition, noise, guidance, [t.steps for t in these])
        audio, semantic = self.vocoder.step(ids, latent, token)
        for row, talk in enumerate(these):
            talk.tokens.append(int(token[row]))
            talk.latents.append(latent[row])
            talk.semantics.append(semantic[row])
            if token[row] == FRAME:
                talk.audio.append(audio[row])

    def speak(self, session, talk):
        while not talk.ended:
            self.step({session: talk})
