"""The LLM stage: Qwen2 backbone with a KV cache per session, both guidance branches in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.presets import Weights
from harness.vibevoice.sessions import Sessions

ATTENTION = "vibevoice_sessions"
KV_LIMIT_BYTES = 8 << 30


@dataclass
class Branch:
    """Keys and values of one sequence: ``kv`` is [layers, 2, kv heads, capacity, head size], filled to ``length``."""

    kv: torch.Tensor
    length: int = 0


@dataclass
class _Session:
    with_prompt: Branch
    without_prompt: Branch
    forced: bool
    pending_token: int | None  # fed in the next step instead of the feedback of a frame
    fill_after_prompt: tuple[int, int]  # prompt tokens, frames then taken as spoken: positions without contents


class LLMStage:
    """Sessions of the backbone: open, prefill in parts, step together, close.

    The room of a session is taken once, when it opens, for all the frames that it may speak; nothing is copied as
    it grows. ``capacity_bytes`` of a session: (prompt + 2 x frames) x kv_bytes_per_token.
    """

    def __init__(self, weights: Weights, kv_limit_bytes: int = KV_LIMIT_BYTES):
        self.config = weights.config
        text = weights.config.text_config
        self.backbone = weights.backbone(ATTENTION)
        self.acoustic, self.semantic = weights.acoustic_connector(), weights.semantic_connector()
        self.device, self.dtype = weights.device, weights.dtype
        self.special = {
            wire.TOKEN_SPEECH_FRAME: self.config.audio_token_id,
            wire.TOKEN_SPEECH_BEGIN: self.config.audio_bos_token_id,
            wire.TOKEN_SPEECH_END: self.config.audio_eos_token_id,
            wire.TOKEN_END_OF_TEXT: self.config.eos_token_id,
        }
        self.legal_rows = weights.head_rows([self.special[t] for t in sorted(self.special)])
        head_size = text.hidden_size // text.num_attention_heads
        self._kv_shape = (text.num_hidden_layers, 2, text.num_key_value_heads, head_size)
        self.kv_bytes_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size
        self.kv_bytes_per_token *= self.dtype.itemsize
        self.sessions: Sessions[_Session] = Sessions(wire.LLM)
        self.kv_limit_bytes = kv_limit_bytes

    def open(self, session_id: int, prompt_tokens: int, frames: int, start_frame: int = 0, forced: bool = True) -> None:
        """Take room for a session; ``frames`` counts all that it may hold, ``start_frame`` of them as if spoken."""
        with_rows, without_rows = prompt_tokens + 1 + frames, 1 + frames
        self._admit((with_rows + without_rows) * self.kv_bytes_per_token)
        session = _Session(
            with_prompt=self._branch(with_rows),
            without_prompt=self._branch(without_rows, filled=start_frame),
            forced=forced,
            pending_token=self.config.audio_bos_token_id,
            fill_after_prompt=(prompt_tokens, start_frame),
        )
        self.sessions.open(session_id, session)

    def close(self, session_id: int) -> None:
        self.sessions.close(session_id)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the open sessions hold."""
        return sum(s.with_prompt.kv.nbytes + s.without_prompt.kv.nbytes for s in self.sessions.states())

    @torch.inference_mode()
    def prefill(self, session_id: int, token_ids: torch.Tensor, voice_frames: torch.Tensor) -> None:
        """Add token_ids [T] to the prompt; voice_frames [V, 64] fill the places of the audio tokens among them."""
        session = self.sessions.get(session_id)
        branch = session.with_prompt
        ids = token_ids.to(self.device, torch.long)
        embeds = self.backbone.embed_tokens(ids)
        places = ids == self.config.audio_token_id
        if voice_frames.numel():
            embeds[places] = self.acoustic(voice_frames.to(self.device, self.dtype))
        positions = torch.arange(branch.length, branch.length + len(ids), device=self.device)
        self._forward(embeds[None], positions[None], _PrefillKV(branch))
        branch.length += len(ids)
        prompt_tokens, spoken = session.fill_after_prompt
        if spoken and branch.length == prompt_tokens:
            branch.kv[:, :, :, branch.length : branch.length + spoken] = 0
            branch.length += spoken

    @torch.inference_mode()
    def step(
        self, session_ids: list[int], latent: torch.Tensor, semantic: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One frame for each session: latent [N, 64] and semantic [N, 128] of its frame before.

        Returns condition [N, 2, hidden] (with, without the prompt) and token [N] (wire.TOKEN_*).
        """
        sessions = [self.sessions.get(session_id) for session_id in session_ids]
        branches = [s.with_prompt for s in sessions] + [s.without_prompt for s in sessions]
        self._check_room(session_ids, branches)
        embeds = self._inputs(sessions, latent, semantic)
        positions = torch.tensor([[branch.length] for branch in branches], device=self.device)
        hidden = self._forward(embeds.repeat(2, 1)[:, None], positions, _StepKV(branches))[:, 0]
        tokens = self._tokens(sessions, hidden[: len(sessions)])
        self._advance(sessions, tokens)
        condition = torch.stack(hidden.float().chunk(2), dim=1).cpu()
        return condition, torch.tensor(tokens, dtype=torch.int32)

    def _forward(self, embeds: torch.Tensor, positions: torch.Tensor, kv) -> torch.Tensor:
        output = self.backbone(inputs_embeds=embeds, position_ids=positions, use_cache=False, session_kv=kv)
        return output.last_hidden_state

    def _inputs(self, sessions: list[_Session], latent: torch.Tensor, semantic: torch.Tensor) -> torch.Tensor:
        embeds = self.acoustic(latent.to(self.device, self.dtype))
        embeds = embeds + self.semantic(semantic.to(self.device, self.dtype))
        rows = [i for i, session in enumerate(sessions) if session.pending_token is not None]
        if rows:
            ids = torch.tensor([sessions[i].pending_token for i in rows], device=self.device)
            embeds[rows] = self.backbone.embed_tokens(ids)
        return embeds

    def _tokens(self, sessions: list[_Session], hidden: torch.Tensor) -> list[int]:
        said = (hidden @ self.legal_rows.T).argmax(dim=-1).tolist()
        return [wire.TOKEN_SPEECH_FRAME if s.forced else t for s, t in zip(sessions, said, strict=True)]

    def _advance(self, sessions: list[_Session], tokens: list[int]) -> None:
        """Only a speech frame advances the branch without the prompt; "speech begin" resets it to its first row."""
        for session, token in zip(sessions, tokens, strict=True):
            session.with_prompt.length += 1
            speaks = token == wire.TOKEN_SPEECH_FRAME
            session.pending_token = None if speaks else self.special[token]
            if speaks:
                session.without_prompt.length += 1
            elif token == wire.TOKEN_SPEECH_BEGIN:
                session.without_prompt.length = min(1, session.without_prompt.length)

    def _branch(self, capacity: int, filled: int = 0) -> Branch:
        layers, two, heads, size = self._kv_shape
        kv = torch.empty(layers, two, heads, capacity, size, device=self.device, dtype=self.dtype)
        kv[:, :, :, :filled] = 0
        return Branch(kv, filled)

    def _admit(self, needed_bytes: int) -> None:
        self.sessions.drop_idle()
        free_bytes = self.kv_limit_bytes - self.kv_bytes
        if needed_bytes > free_bytes:
            raise RequestError(
                f"busy: the session needs {needed_bytes / 2**20:.0f} MiB of KV cache and {free_bytes / 2**20:.0f} of "
                f"{self.kv_limit_bytes / 2**20:.0f} MiB are free; try again when others have ended"
            )

    def _check_room(self, session_ids: list[int], branches: list[Branch]) -> None:
        for row, branch in enumerate(branches):
            if branch.length >= branch.kv.shape[3]:
                raise RequestError(
                    f"session {session_ids[row % len(session_ids)]} has spoken all the frames it reserved room for"
                )


class _StepKV:
    """Writes one new position per branch and lets it attend to all of its own past, row by row.

    Rows differ in length, so each pays for its own context only.
    """

    def __init__(self, branches: list[Branch]):
        self.branches = branches

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, scale: float) -> torch.Tensor:
        heads, size = new.shape[2], new.shape[-1]
        # The query heads of a group share their KV head: as extra query positions they need no copies of it.
        grouped = query.view(len(query), heads, -1, size)
        output = torch.empty_like(grouped)
        for row, branch in enumerate(self.branches):
            kv = branch.kv[layer]
            kv[:, :, branch.length : branch.length + 1] = new[row]
            past = kv[:, None, :, : branch.length + 1]
            output[row] = scaled_dot_product_attention(grouped[row : row + 1], past[0], past[1], scale=scale)[0]
        return output.view(len(query), 1, -1, size)


class _PrefillKV:
    """Writes the positions of one prompt part and attends causally to the past and to itself."""

    def __init__(self, branch: Branch):
        self.branch = branch

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, scale: float) -> torch.Tensor:
        start, count = self.branch.length, query.shape[2]
        kv = self.branch.kv[layer]
        kv[:, :, start : start + count] = new[0]
        past = kv[:, None, :, : start + count]
        mask = torch.ones(count, start + count, dtype=torch.bool, device=query.device).tril(start)
        output = scaled_dot_product_attention(query, past[0], past[1], attn_mask=mask, scale=scale, enable_gqa=True)
        return output.transpose(1, 2)


def _session_attention(module, query, key, value, attention_mask, scaling, session_kv, **_):
    new = torch.stack((key, value), dim=1)  # [rows, 2, kv heads, new positions, head size]
    return session_kv.attend(module.layer_idx, query, new, scaling), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _session_attention)
