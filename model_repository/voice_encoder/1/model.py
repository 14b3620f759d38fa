"""Triton adapter of the voice encoder: a voice sample becomes acoustic frames."""

from harness import wire
from harness.vibevoice import backend
from harness.vibevoice.process.door import Door


class TritonPythonModel:
    def initialize(self, args):
        self.door = Door(args["model_name"])
        self.stage = backend.stage(args)

    def execute(self, requests):
        return self.door.answer(requests, lambda ours: backend.answer_each(ours, self._encode))

    def _encode(self, request):
        waveform = backend.tensor(backend.given(request, wire.WAVEFORM)[0])
        return backend.response(**{wire.VOICE_FRAMES: self.stage.encode(waveform).reshape(1, -1)})
