"""Access control of a stage: it accepts calls from the entry of its own server only.

The key goes with each call as a request parameter, through the ensemble too; it appears in no response and no log.
Only a Triton stub process can import this module.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb

from harness import wire
from harness.host import keys
from harness.vibevoice.process.stubs import own_server

_START, _END = pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START, pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
# required by Triton for the call that ends a session
_LAST = {
    wire.LLM: {wire.TOKEN_IDS: np.zeros((1, 1), np.int32)},
    wire.VOCODER: {
        wire.LATENT: np.zeros((1, wire.LATENT_SIZE), np.float32),
        wire.TOKEN: np.full((1, 1), wire.TOKEN_SPEECH_BEGIN, np.int32),
    },
}
_OUTPUT = {wire.LLM: wire.TOKEN, wire.VOCODER: wire.SEMANTIC}


def server_key() -> str:
    """The key of this process's server. Raises ServerError where it has ended."""
    return keys.shared_key(keys.stage_key_file(keys.server_mark(own_server())))


def as_parameters(key: str) -> dict[str, str]:
    """The parameters with which the entry calls a stage."""
    return {keys.STAGE_PARAMETER: key}


class AccessControl:
    """Passes the calls of the entry to the stage, and rejects all others."""

    def __init__(self, model: str):
        self.model, self.key = model, server_key()
        self._usual = json.dumps(as_parameters(self.key), separators=(",", ":")).encode()
        self._ending = ThreadPoolExecutor(1, thread_name_prefix="access_control")

    def answer(self, requests: list, serve: Callable[[list], list]) -> list:
        """The responses of ``serve`` to the entry's requests, and rejections of all others, in order."""
        known = [self._is_known(request) for request in requests]
        if all(known):
            return serve(requests)
        both = list(zip(requests, known, strict=True))
        ours = [request for request, is_known in both if is_known]
        served = iter(serve(ours) if ours else ())
        return [next(served) if is_known else self._refuse(request) for request, is_known in both]

    def _is_known(self, request) -> bool:
        told = request.parameters()
        if hmac.compare_digest(told.encode(), self._usual):
            return True
        given = json.loads(told or "{}").get(keys.STAGE_PARAMETER, "")
        return isinstance(given, str) and hmac.compare_digest(given.encode(), self.key.encode())

    def _refuse(self, request):
        """Reject a call and end its session, whose slot Triton would keep until it has been idle for long."""
        if self.model in _LAST and request.flags() & _START and not request.flags() & _END:
            self._ending.submit(self._end, request.correlation_id())
        words = f"{wire.REFUSED}{self.model} accepts calls from {wire.ENTRY} only: request speech from {wire.ENTRY}"
        return pb.InferenceResponse(error=pb.TritonError(words))

    def _end(self, session: int | str) -> None:
        try:
            answer = pb.InferenceRequest(
                model_name=self.model,
                inputs=[pb.Tensor(name, value) for name, value in _LAST[self.model].items()],
                requested_output_names=[_OUTPUT[self.model]],
                correlation_id=session,
                flags=_END,
                parameters=as_parameters(self.key),
            ).exec()
            if answer.has_error():
                print("a rejected session could not be ended", flush=True)
        except pb.TritonModelException:
            print("a rejected session could not be ended", flush=True)
