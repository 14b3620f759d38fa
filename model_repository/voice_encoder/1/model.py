"""Triton adapter of the voice encoder: a voice sample becomes acoustic frames."""

from harness import wire
from harness.vibevoice import backend


class TritonPythonModel:
    def initialize(self, args):
        self.stage = backend.stage(args)

    def execute(self, requests):
        return backend.answer_each(requests, self._encode)

    def _encode(self, request):
        waveform = backend.tensor(backend.optional(request, wire.WAVEFORM)[0])
        return backend.response(**{wire.VOICE_FRAMES: self.stage.encode(waveform).reshape(1, -1)})
