"""Triton adapter of the vocoder: acoustic decoder and semantic encoder with a convolution state per session."""

from harness import wire
from harness.vibevoice import backend
from harness.vibevoice.vocoder import VocoderStage


class TritonPythonModel:
    def initialize(self, args):
        self.stage = VocoderStage(backend.weights(args))

    def execute(self, requests):
        for request in requests:
            if request.flags() & backend.START:
                self.stage.open(request.correlation_id())
        try:
            responses = self._step(requests)
        except Exception:
            responses = backend.answer_each(requests, lambda request: self._step([request])[0])
        for request in requests:
            if request.flags() & backend.END:
                self.stage.close(request.correlation_id())
        return responses

    def _step(self, requests):
        tokens = backend.rows(requests, wire.TOKEN)[:, 0]
        session_ids = [request.correlation_id() for request in requests]
        audio, semantic = self.stage.step(session_ids, backend.rows(requests, wire.LATENT), tokens)
        return [
            backend.response(**{wire.AUDIO: audio[i : i + 1], wire.SEMANTIC: semantic[i : i + 1]})
            for i in range(len(requests))
        ]
