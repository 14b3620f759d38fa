"""Triton adapter of the LLM stage: opens, prefills, steps and closes sessions."""

import numpy as np

from harness import wire
from harness.errors import RequestError
from harness.vibevoice import backend
from harness.vibevoice.process.access_control import AccessControl
from harness.vibevoice.process.instances import place_of
from harness.vibevoice.sessions.failures import at_instance


class TritonPythonModel:
    def initialize(self, args):
        self.access = AccessControl(args["model_name"])
        self.stage = backend.stage(args)
        self.place = place_of(args)
        hidden = self.stage.hidden_size
        self.nothing = {
            wire.CONDITION: np.zeros((1, 2, hidden), np.float32),
            wire.TOKEN: np.zeros((1, 1), np.int32),
        }

    def execute(self, requests):
        return self.access.answer(requests, self._serve)

    def finalize(self):
        backend.close()

    def _serve(self, requests):
        steps = [i for i, request in enumerate(requests) if self._is_step(request)]
        stepping = set(steps)
        others = [i for i in range(len(requests)) if i not in stepping]
        responses = dict(zip(others, backend.answer_each([requests[i] for i in others], self._manage), strict=True))
        responses |= dict(zip(steps, backend.answer_together([requests[i] for i in steps], self._step), strict=True))
        return [responses[i] for i in range(len(requests))]

    def _is_step(self, request) -> bool:
        return (
            not request.flags() & (backend.START | backend.END) and backend.optional(request, wire.LATENT) is not None
        )

    def _manage(self, request):
        """Open or close a session, or add to its prompt or to its past."""
        session_id, flags = request.correlation_id(), request.flags()
        if flags & backend.END:
            self.stage.close(session_id)
            return backend.response(**self.nothing)
        if flags & backend.START:
            self._open(session_id, request)
        if backend.optional(request, wire.TOKEN_IDS) is not None:
            self.stage.prefill(session_id, _flat(request, wire.TOKEN_IDS), _rows(request, wire.VOICE_FRAMES))
        if (said := backend.optional(request, wire.PAST_TOKEN)) is not None:
            past = _rows(request, wire.PAST_LATENT), _rows(request, wire.PAST_SEMANTIC, wire.SEMANTIC_SIZE)
            self.stage.replay(session_id, said[0].tolist(), *past)
        return backend.response(**self.nothing)

    def _open(self, session_id: int, request) -> None:
        tokens, frames, start_frame, forced = backend.given(request, wire.SESSION)[0].tolist()
        say = backend.optional(request, wire.SAY)
        said_first = [] if say is None else say[0].tolist()
        try:
            self.stage.open(session_id, tokens, frames, start_frame, bool(forced), said_first)
        except RequestError as error:
            raise at_instance(error, *self.place) from None

    def _step(self, requests):
        latent, semantic = backend.rows(requests, wire.LATENT), backend.rows(requests, wire.SEMANTIC)
        condition, token = self.stage.step([r.correlation_id() for r in requests], latent, semantic)
        return backend.responses(**{wire.CONDITION: condition, wire.TOKEN: token[:, None]})


def _flat(request, name: str):
    return backend.tensor(backend.given(request, name)[0])


def _rows(request, name: str, size: int = wire.LATENT_SIZE):
    values = _flat(request, name)
    if len(values) % size:
        raise RequestError(f"{name} has {len(values)} values: send {size} for each row")
    return values.reshape(-1, size)
