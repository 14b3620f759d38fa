"""Triton adapter of the diffusion stage: stateless, any requests share a batch."""

from harness import wire
from harness.errors import RequestError
from harness.vibevoice import backend
from harness.vibevoice.process.access_control import AccessControl


class TritonPythonModel:
    def initialize(self, args):
        self.access = AccessControl(args["model_name"])
        self.stage = backend.stage(args)

    def execute(self, requests):
        return self.access.answer(requests, lambda ours: backend.answer_together(ours, self._denoise))

    def _denoise(self, requests):
        condition, noise = backend.rows(requests, wire.CONDITION), backend.rows(requests, wire.NOISE)
        guidance, steps = backend.rows(requests, wire.GUIDANCE), backend.rows(requests, wire.STEPS)[:, 0].tolist()
        if not 1 <= min(steps) <= max(steps) <= wire.MAX_DIFFUSION_STEPS:
            raise RequestError(f"{wire.STEPS} lie outside 1 to {wire.MAX_DIFFUSION_STEPS}")
        latent = self.stage.denoise(condition, noise, guidance, steps)
        return backend.responses(**{wire.LATENT: latent})
