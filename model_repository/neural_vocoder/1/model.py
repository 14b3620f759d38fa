"""Triton adapter of the vocoder: acoustic decoder and semantic encoder with a convolution state per session."""

import numpy as np

from harness import wire
from harness.vibevoice import backend
from harness.vibevoice.process.access_control import AccessControl


class TritonPythonModel:
    def initialize(self, args):
        self.access = AccessControl(args["model_name"])
        self.stage = backend.stage(args)
        self.nothing = {
            wire.AUDIO: np.zeros((1, wire.SAMPLES_PER_FRAME), np.float32),
            wire.SEMANTIC: np.zeros((1, wire.SEMANTIC_SIZE), np.float32),
        }

    def execute(self, requests):
        return self.access.answer(requests, self._serve)

    def finalize(self):
        backend.close()

    def _serve(self, requests):
        managing = {i for i, request in enumerate(requests) if request.flags() & (backend.START | backend.END)}
        steps = [request for i, request in enumerate(requests) if i not in managing]
        managed = iter(backend.answer_each([requests[i] for i in sorted(managing)], self._manage))
        stepped = iter(backend.answer_together(steps, self._step))
        return [next(managed if i in managing else stepped) for i in range(len(requests))]

    def _manage(self, request):
        """Open or close a session; its convolution state comes with the one and goes with the other."""
        session_id, state = request.correlation_id(), backend.optional(request, wire.STATE)
        if request.flags() & backend.START:
            self.stage.open(session_id, None if state is None else backend.tensor(state[0]))
            return backend.response(**self.nothing)
        return backend.response(**self.nothing, **{wire.STATE: self.stage.close(session_id)[None]})

    def _step(self, requests):
        tokens = backend.rows(requests, wire.TOKEN)[:, 0]
        session_ids = [request.correlation_id() for request in requests]
        audio, semantic = self.stage.step(session_ids, backend.rows(requests, wire.LATENT), tokens)
        return backend.responses(**{wire.AUDIO: audio, wire.SEMANTIC: semantic})
