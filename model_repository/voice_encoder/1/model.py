"""Triton adapter of the voice encoder: a voice sample becomes acoustic frames."""

from harness import wire
from harness.vibevoice import backend
from harness.vibevoice.process.access_control import AccessControl


class TritonPythonModel:
    def initialize(self, args):
        self.access = AccessControl(args["model_name"])
        self.stage = backend.stage(args)

    def execute(self, requests):
        return self.access.answer(requests, lambda ours: backend.answer_each(ours, self._encode))

    def _encode(self, request):
        waveform = backend.tensor(backend.given(request, wire.WAVEFORM)[0])
        return backend.response(**{wire.VOICE_FRAMES: self.stage.encode(waveform).reshape(1, -1)})
