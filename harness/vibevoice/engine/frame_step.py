"""A frame step of many sessions in one process: backbone, denoising and vocoder without inter-process transfers.

``EagerStep`` calls the three stages one after another, on any device; ``graph_step.GraphStep`` is one CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from harness import wire
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage


@dataclass(frozen=True)
class Opening:
    """How a session starts: see ``LLMStage.open``.

    A resumed session also has its convolution state [values], and the latent [64] and semantic features [128] of its
    last frame.
    """

    prompt_tokens: int
    frames: int
    start_frame: int = 0
    forced: bool = True
    say: tuple[int, ...] = ()
    state: np.ndarray | None = None
    latent: np.ndarray | None = None
    semantic: np.ndarray | None = None


@dataclass(frozen=True)
class Row:
    """The input of one session to a step: noise [64], its guidance scale and its number of denoising steps."""

    session: int
    noise: np.ndarray
    guidance: float
    steps: int


@dataclass(frozen=True)
class PromptPart:
    """A part of a session's prompt: token ids, and voice frames [frames, 64] for the audio tokens among them."""

    session: int
    token_ids: Sequence[int]
    voice_frames: np.ndarray


class Frames(Protocol):
    """The results of a step, row by row; reading ``values`` waits for the device."""

    tokens: list[int]  # wire.TOKEN_*; a row with any token but a speech frame has no audio
    ready: bool  # its values have arrived already
    took_ns: int  # the device's time for the step, set once its values are read; 0: use the time of the calls

    def values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Audio [N, 3200], latent [N, 64] and semantic features [N, 128], owned by the caller."""
        ...


class FrameStep(Protocol):
    """The interface of a model to the engine.

    All calls come from one thread. One more step may be launched before the values of the previous one are read.
    """

    odd_groups: int  # how many other numbers of denoising steps than the default one launch may contain
    prompt_tokens: int  # most prompt tokens per call of ``read``
    prompt_ns: int  # total time spent on reading prompts, on the device
    token_ns: float  # time per prompt token in the last reading; 0 before the first

    def open(self, session: int, opening: Opening) -> None:
        """Open a session. Raises RequestError; the message begins with wire.BUSY if there may be room later."""
        ...

    def read(self, parts: Sequence[PromptPart]) -> None: ...

    def replay(self, session: int, tokens: np.ndarray, latent: np.ndarray, semantic: np.ndarray) -> None: ...

    def check(self, session: int) -> None:
        """Raise RequestError where the session has no room for another step."""
        ...

    def launch(self, rows: Sequence[Row]) -> Frames: ...

    def is_broken_by(self, error: Exception) -> bool:
        """Whether the device is unusable after this error."""
        ...

    def close(self, session: int, keep: bool = False) -> np.ndarray:
        """Close a session if it is open; returns its convolution state [values] if ``keep`` is set."""
        ...


@dataclass(frozen=True)
class _Ready:
    ready, took_ns = True, 0

    tokens: list[int]
    made: tuple[np.ndarray, np.ndarray, np.ndarray]

    def values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.made


class EagerStep:
    """The stages of the staged ensemble, called in turn."""

    odd_groups = wire.MAX_DIFFUSION_STEPS

    def __init__(self, weights: Weights, kv_limit_bytes: int, prompt_tokens: int):
        self.llm, self.diffusion = LLMStage(weights, kv_limit_bytes), DiffusionStage(weights)
        self.vocoder = VocoderStage(weights)
        for stage in (self.llm, self.vocoder):
            stage.sessions.idle_limit_s = float("inf")  # the engine closes its sessions itself
        self.device, self.dtype, self.graphs = weights.device, weights.dtype, None
        self.kv_limit_bytes, self.kv_bytes_per_token = kv_limit_bytes, self.llm.kv_bytes_per_token
        self.prompt_tokens, self.prompt_ns, self.token_ns = prompt_tokens, 0, 0.0
        self._fed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each one's last frame

    def open(self, session: int, opening: Opening) -> None:
        self.llm.open(session, opening.prompt_tokens, opening.frames, opening.start_frame, opening.forced, opening.say)
        try:
            self.vocoder.open(session, None if opening.state is None else torch.from_numpy(opening.state))
            self._fed[session] = _row(opening.latent, wire.LATENT_SIZE), _row(opening.semantic, wire.SEMANTIC_SIZE)
        except Exception:
            self.close(session)
            raise

    def read(self, parts: Sequence[PromptPart]) -> None:
        began = time.monotonic_ns()
        for part in parts:
            ids = torch.tensor(part.token_ids, dtype=torch.int32)
            self.llm.prefill(part.session, ids, torch.from_numpy(part.voice_frames))
        took_ns = time.monotonic_ns() - began
        self.prompt_ns += took_ns
        self.token_ns = took_ns / sum(len(part.token_ids) for part in parts)

    def replay(self, session: int, tokens: np.ndarray, latent: np.ndarray, semantic: np.ndarray) -> None:
        began = time.monotonic_ns()
        self.llm.replay(session, tokens.tolist(), torch.from_numpy(latent), torch.from_numpy(semantic))
        self.prompt_ns += time.monotonic_ns() - began

    def check(self, session: int) -> None:
        self.llm.check_step(session)

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row]) -> Frames:
        sessions = [row.session for row in rows]
        latent, semantic = (torch.stack(each) for each in zip(*(self._fed[s] for s in sessions), strict=True))
        condition, tokens = self.llm.step(sessions, latent, semantic)
        noise = torch.from_numpy(np.stack([row.noise for row in rows]))
        guidance = torch.tensor([[row.guidance] for row in rows])
        latent = self.diffusion.denoise(condition, noise, guidance, [row.steps for row in rows])
        audio, semantic = self.vocoder.step(sessions, latent, tokens)
        self._fed |= zip(sessions, zip(latent.unbind(), semantic.unbind(), strict=True), strict=True)
        return _Ready(tokens.tolist(), (audio.numpy(), latent.numpy(), semantic.numpy()))

    def is_broken_by(self, error: Exception) -> bool:
        return False

    def close(self, session: int, keep: bool = False) -> np.ndarray:
        self.llm.close(session)
        self._fed.pop(session, None)
        return self.vocoder.close(session).numpy()


def _row(values: np.ndarray | None, size: int) -> torch.Tensor:
    return torch.zeros(size) if values is None else torch.from_numpy(np.array(values, np.float32))
