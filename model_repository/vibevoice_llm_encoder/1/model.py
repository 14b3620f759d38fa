"""Triton adapter of the LLM stage: opens, prefills, steps and closes sessions."""

import torch

from harness import wire
from harness.vibevoice import backend
from harness.vibevoice.llm import LLMStage


class TritonPythonModel:
    def initialize(self, args):
        self.stage = LLMStage(backend.weights(args), int(backend.parameters(args)["kv_limit_bytes"]))
        hidden = self.stage.config.text_config.hidden_size
        self.nothing = {wire.CONDITION: torch.zeros(1, 2, hidden), wire.TOKEN: torch.zeros(1, 1, dtype=torch.int32)}

    def execute(self, requests):
        steps = [i for i, request in enumerate(requests) if self._is_step(request)]
        stepping = set(steps)
        others = [i for i in range(len(requests)) if i not in stepping]
        responses = dict(zip(others, backend.answer_each([requests[i] for i in others], self._manage), strict=True))
        responses |= dict(zip(steps, self._step([requests[i] for i in steps]), strict=True))
        return [responses[i] for i in range(len(requests))]

    def _is_step(self, request) -> bool:
        return not request.flags() & backend.END and backend.optional(request, wire.TOKEN_IDS) is None

    def _manage(self, request):
        session_id = request.correlation_id()
        if request.flags() & backend.END:
            self.stage.close(session_id)
            return backend.response(**self.nothing)
        if request.flags() & backend.START:
            tokens, frames, start_frame, forced = backend.optional(request, wire.SESSION)[0].tolist()
            self.stage.open(session_id, tokens, frames, start_frame, bool(forced))
        token_ids = torch.from_numpy(backend.optional(request, wire.TOKEN_IDS)[0])
        voice_frames = torch.from_numpy(backend.optional(request, wire.VOICE_FRAMES)[0])
        self.stage.prefill(session_id, token_ids, voice_frames.view(-1, wire.LATENT_SIZE))
        return backend.response(**self.nothing)

    def _step(self, requests):
        """All frames in one batch; if that fails, each alone, so that one broken session fails by itself."""
        if not requests:
            return []
        try:
            return self._step_batch(requests)
        except Exception:
            return backend.answer_each(requests, lambda request: self._step_batch([request])[0])

    def _step_batch(self, requests):
        latent, semantic = backend.rows(requests, wire.LATENT), backend.rows(requests, wire.SEMANTIC)
        condition, token = self.stage.step([r.correlation_id() for r in requests], latent, semantic)
        return [
            backend.response(**{wire.CONDITION: condition[i : i + 1], wire.TOKEN: token[i : i + 1, None]})
            for i in range(len(requests))
        ]
