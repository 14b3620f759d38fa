"""The LLM stage: Qwen2 backbone with a KV cache per session, both guidance branches in one pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.kernels.cuda_graphs import Graphs, Input
from harness.vibevoice.process.setup import DEVICE_ERRORS
from harness.vibevoice.sessions.table import SPARE_STEPS, NoRoom, Sessions, check_numbers, check_room, room_used_up
from harness.vibevoice.stages.backbone import Backbone
from harness.vibevoice.stages.presets import Weights

KV_LIMIT_BYTES = 8 << 30
_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # returns the weights' mass too
_QUERY_BLOCK = 256  # positions of a later prompt part per attention call: the mask has a row for each


@dataclass
class Branch:
    """Keys and values of one sequence: ``kv`` is [layers, 2, kv heads, capacity, head size], filled to ``length``."""

    kv: torch.Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.kv.shape[3]

    def fill(self, count: int) -> None:
        """Count ``count`` positions as filled without writing them."""
        self.kv[:, :, :, self.length : self.length + count] = 0
        self.length += count


@dataclass
class _Session:
    with_prompt: Branch
    without_prompt: Branch
    forced: bool
    say: deque[int]  # wire.TOKEN_* still forced before the model chooses
    pending_token: int | None  # fed in the next step instead of a frame's feedback

    @property
    def lengths(self) -> list[int]:
        return [self.with_prompt.length, self.without_prompt.length]


class LLMStage:
    """Sessions of the backbone: open, prefill in parts, step together, close.

    The room of a session is allocated when it opens, for all the steps that it may take; nothing is copied as it grows.
    Bytes of a session: (prompt + 1 + frames + others + 1 + frames) x kv_bytes_per_token, where others are the steps
    with other tokens: as many as are forced, and some spare ones if the session ends by itself.
    """

    def __init__(self, weights: Weights, kv_limit_bytes: int = KV_LIMIT_BYTES):
        self.config = weights.config
        text = weights.config.text_config
        self.hidden_size = text.hidden_size
        self.backbone = Backbone(weights.backbone())
        self.compiled = weights.compiled("backbone.CompiledBackbone", self.backbone)
        self.acoustic, self.semantic = weights.acoustic_connector(), weights.semantic_connector()
        self.connectors = weights.compiled("connectors.CompiledConnectors", (self.acoustic, self.semantic))
        self.device, self.dtype = weights.device, weights.dtype
        self.special = {
            wire.TOKEN_SPEECH_FRAME: self.config.audio_token_id,
            wire.TOKEN_SPEECH_BEGIN: self.config.audio_bos_token_id,
            wire.TOKEN_SPEECH_END: self.config.audio_eos_token_id,
            wire.TOKEN_END_OF_TEXT: self.config.eos_token_id,
        }
        # in float32: rounded logits of the four tokens are often equal
        self.legal_rows = weights.head_rows([self.special[t] for t in sorted(self.special)]).float()
        head_size = text.hidden_size // text.num_attention_heads
        self._kv_shape = (text.num_hidden_layers, 2, text.num_key_value_heads, head_size)
        self.kv_bytes_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size
        self.kv_bytes_per_token *= self.dtype.itemsize
        self.sessions: Sessions[_Session] = Sessions(wire.LLM)
        self._nobodys: torch.Tensor | None = None
        self.kv_limit_bytes = kv_limit_bytes
        if self.device.type == "cuda":
            from harness.vibevoice.kernels.ragged import prepare  # compiles here, not while serving

            prepare(self.backbone.heads, self.backbone.kv_heads, self.backbone.size, self.dtype, self.device)
            self.backbone.warm_up()
        self.flash = _has_flash(self.device, self.dtype)
        self.graphs = None
        if weights.graph_batch:
            from harness.vibevoice.kernels.ragged import recorded_parts

            parts = recorded_parts(text.max_position_embeddings)
            self.graphs = Graphs(self.compute, self.graph_inputs(), self.device, weights.graph_batch, parts)

    def open(
        self,
        session_id: int,
        prompt_tokens: int,
        frames: int,
        start_frame: int = 0,
        forced: bool = True,
        say: Sequence[int] = (),
    ) -> None:
        """Open a session with room for ``frames`` frames, of which ``start_frame`` count as already spoken.

        If any do, the prompt counts as read too: both are positions without contents, and nothing is prefilled. The
        tokens of ``say`` (wire.TOKEN_*) are forced first; then only frames if ``forced``, otherwise what the model
        chooses. Raises RequestError; the message begins with wire.BUSY if there may be room later.
        """
        check_numbers(prompt_tokens, frames, start_frame)
        if not self.special.keys() >= set(say):  # in the middle of a step it would fail the whole batch
            raise RequestError(f"{wire.SAY} has unknown tokens: {sorted(set(say) - self.special.keys())}")
        with_rows = prompt_tokens + 1 + frames + len(say) + (0 if forced else SPARE_STEPS)
        with_prompt, without_prompt = self._room(with_rows, 1 + frames)
        if start_frame:
            with_prompt.fill(prompt_tokens + start_frame)
            without_prompt.fill(start_frame)
        session = _Session(
            with_prompt=with_prompt,
            without_prompt=without_prompt,
            forced=forced,
            say=deque(say),
            pending_token=self.config.audio_bos_token_id,
        )
        self.sessions.open(session_id, session)

    def close(self, session_id: int) -> None:
        self.sessions.close(session_id)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the open sessions hold."""
        return sum(s.with_prompt.kv.nbytes + s.without_prompt.kv.nbytes for s in self.sessions.states())

    @property
    def kv_used_bytes(self) -> int:
        """Bytes of them that are filled."""
        return sum(sum(s.lengths) for s in self.sessions.states()) * self.kv_bytes_per_token

    @torch.inference_mode()
    def prefill(self, session_id: int, token_ids: torch.Tensor, voice_frames: torch.Tensor) -> None:
        """Add token_ids [T] to the prompt; voice_frames [V, 64] replace the audio tokens among them."""
        places = (token_ids == self.config.audio_token_id).nonzero().flatten()  # on the host: no wait for a GPU
        branch = self.takes(session_id, token_ids, len(places), len(voice_frames))
        embeds = self.backbone.embed_tokens(token_ids.to(self.device, torch.long))
        if voice_frames.numel():
            embeds.index_copy_(0, places.to(self.device), self.acoustic(voice_frames.to(self.device, self.dtype)))
        self._attended(branch, embeds)
        self.has_read(session_id, len(token_ids))

    def takes(self, session_id: int, token_ids: torch.Tensor, places: int, voice_frames: int) -> Branch:
        """The branch for these prompt tokens, ``places`` of which are audio tokens. Raises RequestError."""
        branch = self.sessions.get(session_id).with_prompt
        self._check_ids(token_ids)
        if places != voice_frames:
            raise RequestError(f"a prompt part has {places} audio tokens for {voice_frames} voice frames")
        if branch.length + len(token_ids) > branch.capacity:
            raise room_used_up(branch.capacity)
        return branch

    def has_read(self, session_id: int, count: int) -> None:
        """Note that a session's cache holds ``count`` more tokens of its prompt."""
        self.sessions.get(session_id).with_prompt.length += count

    @torch.inference_mode()
    def replay(self, session_id: int, tokens: Sequence[int], latent: torch.Tensor, semantic: torch.Tensor) -> None:
        """Take steps whose results are known: step i was fed latent[i] [64] and semantic[i] [128] and chose tokens[i].

        Both branches then hold what stepping would have written, after one pass each.
        """
        session = self.sessions.get(session_id)
        if not tokens or not self.special.keys() >= set(tokens) or not len(tokens) == len(latent) == len(semantic):
            raise RequestError(
                f"a past of {len(tokens)} steps has unknown tokens, or inputs that do not match its steps"
            )
        embeds = self._fed(latent, semantic, [session.pending_token, *map(self._follows, tokens[:-1])])
        self._extend(session.with_prompt, embeds)
        reset = max((i for i, token in enumerate(tokens) if token == wire.TOKEN_SPEECH_BEGIN), default=-1)
        if reset >= 0:
            session.without_prompt.length = 0
        frames = [i for i, token in enumerate(tokens) if token == wire.TOKEN_SPEECH_FRAME and i > reset]
        if frames:
            self._extend(session.without_prompt, embeds[frames])
        session.pending_token = self._follows(tokens[-1])

    def check_step(self, session_id: int) -> None:
        """Raise RequestError where a session is unknown, or has no room for another step."""
        session = self.sessions.get(session_id)
        self._check_room([session.with_prompt, session.without_prompt])

    @torch.inference_mode()
    def step(
        self, session_ids: list[int], latent: torch.Tensor, semantic: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One frame for each session: latent [N, 64] and semantic [N, 128] of its previous frame.

        Returns condition [N, 2, hidden] (with, without the prompt) and token [N] (wire.TOKEN_*).
        """
        sessions = [self.sessions.get(session_id) for session_id in session_ids]
        branches = [s.with_prompt for s in sessions] + [s.without_prompt for s in sessions]
        self._check_room(branches)
        condition, said = self._computed(sessions, branches, latent, semantic)
        # before any session changes: where this fails, each session is stepped again separately
        condition = condition.cpu()
        tokens = self._tokens(sessions, said)
        self.advance(sessions, tokens)
        return condition, torch.tensor(tokens, dtype=torch.int32)

    def _computed(self, sessions, branches, latent, semantic) -> tuple[torch.Tensor, torch.Tensor]:
        """Condition [N, 2, hidden] and the most likely token [N] of each session, on the device."""
        pending = [session.pending_token for session in sessions]
        if self.graphs and (answer := self._replayed(branches, latent, semantic, pending)):
            return answer
        embeds = self._fed(latent, semantic, pending)
        return self._answer(self._hidden(embeds.repeat(2, 1), branches))

    def _replayed(self, branches, latent, semantic, pending) -> tuple[torch.Tensor, ...] | None:
        from harness.vibevoice.kernels import ragged

        lengths = [branch.length for branch in branches]
        facts = torch.tensor(ragged.facts_of([branch.kv for branch in branches], lengths))
        by_session = facts.view(2, -1, 3).transpose(0, 1)
        return self.graphs(latent, semantic, _ids(pending), by_session, variant=ragged.parts_of(lengths))

    def graph_inputs(self) -> tuple[Input, ...]:
        """The inputs of ``compute``. Padding rows write their position into a cache that nobody reads."""
        if self._nobodys is None:
            layers, two, heads, size = self._kv_shape
            self._nobodys = torch.zeros(layers, two, heads, 1, size, device=self.device, dtype=self.dtype)
        facts = Input((2, 3), torch.int64, torch.tensor([self._nobodys.data_ptr(), 1, 0]))
        ids = Input((), torch.int64, torch.tensor(-1))
        return Input((wire.LATENT_SIZE,)), Input((wire.SEMANTIC_SIZE,)), ids, facts

    def compute(self, latent, semantic, ids, facts, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A step on the device alone; returns as ``_computed``.

        latent [N, 64], semantic [N, 128], ids [N] as ``feedback`` takes them, and facts [N, 2, 3]: those of
        ``ragged.RaggedStep`` for both branches of each session.
        """
        from harness.vibevoice.kernels.ragged import RaggedStep

        facts = facts.transpose(0, 1).reshape(-1, 3)
        embeds = self.feedback(latent.to(self.dtype), semantic.to(self.dtype), ids)
        return self._answer(self.backbone(embeds.repeat(2, 1), facts[:, 2], RaggedStep(facts, parts)))

    def _answer(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = hidden.float()
        with_prompt, without_prompt = wide.chunk(2)
        return torch.stack((with_prompt, without_prompt), 1), (with_prompt @ self.legal_rows.T).argmax(dim=-1)

    def _hidden(self, embeds: torch.Tensor, branches: list[Branch]) -> torch.Tensor:
        """The backbone's output for one new position of each branch [branches, hidden]."""
        lengths = [branch.length for branch in branches]
        if self.compiled:
            return self.compiled(embeds, [branch.kv for branch in branches], lengths)
        return self.backbone(embeds, torch.tensor(lengths, device=self.device), self._step_kv(branches))

    def _check_ids(self, token_ids: torch.Tensor) -> None:
        """Raise RequestError for unknown token ids: looking them up makes a GPU unusable to the whole process."""
        most = len(self.backbone.embed_tokens.weight)
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < most:
            raise RequestError(f"{wire.TOKEN_IDS} lie outside 0 to {most - 1}")

    def _step_kv(self, branches: list[Branch]):
        if self.device.type != "cuda":
            return _StepKV(branches)
        from harness.vibevoice.kernels.ragged import RaggedStep  # needs a GPU to compile

        return RaggedStep.of([branch.kv for branch in branches], [branch.length for branch in branches])

    def _extend(self, branch: Branch, embeds: torch.Tensor) -> None:
        """Append positions with these inputs [T, hidden] to one branch."""
        if branch.length + len(embeds) > branch.capacity:
            raise room_used_up(branch.capacity)
        self._attended(branch, embeds)
        branch.length += len(embeds)

    def _attended(self, branch: Branch, embeds: torch.Tensor) -> None:
        """Write positions with these inputs [T, hidden] after those of a branch, without counting them yet."""
        if len(embeds):
            positions = torch.arange(branch.length, branch.length + len(embeds), device=self.device)
            self.backbone(embeds, positions, _PrefillKV(branch, self.flash))

    def _fed(self, latent: torch.Tensor, semantic: torch.Tensor, pending: Sequence[int | None]) -> torch.Tensor:
        """The backbone's inputs [N, hidden]: a pending token, otherwise the previous frame's feedback."""
        latent, semantic = latent.to(self.device, self.dtype), semantic.to(self.device, self.dtype)
        if all(token is None for token in pending):
            return self.feedback(latent, semantic)
        return self.feedback(latent, semantic, _ids(pending).to(self.device))

    def feedback(self, latent: torch.Tensor, semantic: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Latents [N, 64] and features [N, 128] as inputs of the backbone [N, hidden], on the device alone.

        A row whose entry in ``ids`` [N] is not -1 is that token's embedding instead.
        """
        if self.connectors:
            embeds = self.connectors(latent, semantic)
        else:
            embeds = self.acoustic(latent) + self.semantic(semantic)
        if ids is None:
            return embeds
        return torch.where((ids >= 0)[:, None], self.backbone.embed_tokens(ids.clamp(0)), embeds)

    def _follows(self, token: int) -> int | None:
        """The token id to feed after a token; None after a frame, whose own feedback is fed."""
        return None if token == wire.TOKEN_SPEECH_FRAME else self.special[token]

    def told(self, session: _Session) -> int | None:
        """The next forced token of a session (wire.TOKEN_*); None where the model chooses."""
        if session.say:
            return session.say[0]
        return wire.TOKEN_SPEECH_FRAME if session.forced else None

    def _tokens(self, sessions: list[_Session], likely: torch.Tensor) -> list[int]:
        told = [self.told(session) for session in sessions]
        if None not in told:  # then the model's choice is not needed
            return told
        return [said if mine is None else mine for mine, said in zip(told, likely.tolist(), strict=True)]

    def advance(self, sessions: list[_Session], tokens: list[int]) -> None:
        """Go on to the next step: only a frame advances the branch without the prompt, "speech begin" clears it."""
        for session, token in zip(sessions, tokens, strict=True):
            if session.say:
                session.say.popleft()
            session.with_prompt.length += 1
            session.pending_token = self._follows(token)
            if token == wire.TOKEN_SPEECH_FRAME:
                session.without_prompt.length += 1
            elif token == wire.TOKEN_SPEECH_BEGIN:
                session.without_prompt.length = 0

    def _room(self, *rows: int) -> list[Branch]:
        """Empty branches with these capacities, if there is room for all of them."""
        self.sessions.drop_idle()
        check_room(sum(rows), self.kv_bytes_per_token, self.kv_bytes, self.kv_limit_bytes)
        layers, two, heads, size = self._kv_shape
        try:
            return [
                Branch(torch.empty(layers, two, heads, count, size, device=self.device, dtype=self.dtype))
                for count in rows
            ]
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a host's allocator raises it directly
            if isinstance(error, DEVICE_ERRORS):
                raise
            raise NoRoom(
                f"{wire.BUSY}{self.device} has no memory left, although kv_limit_bytes is not reached; lower it"
            ) from None

    def _check_room(self, branches: list[Branch]) -> None:
        for branch in branches:
            if branch.length >= branch.capacity:
                raise room_used_up(branch.capacity)


def _ids(pending: Sequence[int | None]) -> torch.Tensor:
    """Pending tokens in the form of ``LLMStage.feedback``: -1 where there is none."""
    return torch.tensor([-1 if token is None else token for token in pending])


def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention is available: it needs a 16-bit type and at least Ampere (sm_80)."""
    if device.type != "cuda" or dtype == torch.float32 or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class _StepKV:
    """Writes one new position per branch and attends from it to the branch's past, row by row.

    Rows differ in length, so each row costs its own context only.
    """

    def __init__(self, branches: list[Branch]):
        self.branches = branches

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, kv_heads, size = key.shape
        new = torch.stack((key, value), 1).unsqueeze(3)
        # The query heads of a group share their KV head: as extra query positions they need no copies of it.
        grouped = query.view(rows, 1, kv_heads, -1, size)
        return torch.cat([self._row(layer, *one) for one in zip(self.branches, grouped, new, strict=True)]).view(
            rows, -1
        )

    def _row(self, layer: int, branch: Branch, query: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        past = branch.kv[layer].narrow(2, 0, branch.length + 1)
        past.narrow(2, branch.length, 1).copy_(new)
        return scaled_dot_product_attention(query, past[:1], past[1:])


class _PrefillKV:
    """Writes the positions of one prompt part and attends causally to the past and to itself."""

    def __init__(self, branch: Branch, flash: bool):
        self.branch, self.flash = branch, flash

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        start, count = self.branch.length, len(query)
        kv = self.branch.kv[layer][:, None]  # [2, 1, KV heads, capacity, size]
        kv[0, 0, :, start : start + count] = key.transpose(0, 1)
        kv[1, 0, :, start : start + count] = value.transpose(0, 1)
        query = query.transpose(0, 1)[None]
        keys, values = kv[:, :, :, : start + count]
        if self.flash:  # "causal" here: the last query sees all keys, at any start
            output = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, True)[0]
            return output[0].transpose(0, 1).reshape(count, -1)
        if start == 0:
            output = scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
            return output[0].transpose(0, 1).reshape(count, -1)
        if query.device.type == "cpu":
            return self._two_parts(kv, query, start)
        blocks = [slice(i, min(i + _QUERY_BLOCK, count)) for i in range(0, count, _QUERY_BLOCK)]
        return torch.cat([self._block(kv, query[:, :, block], start + block.start) for block in blocks])

    def _two_parts(self, kv: torch.Tensor, query: torch.Tensor, start: int) -> torch.Tensor:
        """Attention to the past, which needs no mask, and to the part itself, combined by their weights.

        query [1, heads, T, size] at positions start … start + T -> [T, heads x size]. With a mask over the past, a part
        behind 60,000 positions takes 2.5 times as long.
        """
        heads, count = query.shape[1:3]
        kv_heads = kv.shape[2]
        past = query.reshape(1, kv_heads, -1, query.shape[-1])  # grouped, as in a step
        past, past_mass = _flash_on_cpu(past, *kv[:, :, :, :start])
        own_kv = kv[:, :, :, start : start + count].repeat_interleave(heads // kv_heads, dim=2)
        own, own_mass = _flash_on_cpu(query, *own_kv, 0.0, True)
        weight = torch.sigmoid(past_mass.reshape(own_mass.shape) - own_mass)  # of logarithms of sums of weights
        output = torch.lerp(own, past.reshape(own.shape), weight[..., None].to(own.dtype))
        return output[0].transpose(0, 1).reshape(count, -1)

    def _block(self, kv: torch.Tensor, query: torch.Tensor, start: int) -> torch.Tensor:
        """query [1, heads, T, size] at positions start … start + T, each to its past -> [T, heads x size]."""
        kv_heads, count, size = kv.shape[2], query.shape[2], query.shape[-1]
        keys, values = kv[:, :, :, : start + count]
        mask = torch.ones(count, start + count, dtype=torch.bool, device=query.device).tril(start)
        # As in a step, the query heads of a group stand side by side as positions of their KV head.
        mask = mask.repeat(query.shape[1] // kv_heads, 1)
        grouped = query.reshape(1, kv_heads, -1, size)
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return output.reshape(-1, count, size).transpose(0, 1).reshape(count, -1)
