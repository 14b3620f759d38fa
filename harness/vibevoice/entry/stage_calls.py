"""Calls from the entry to the other models of its server.

Only a Triton stub process can import this module.
"""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb

from harness import wire
from harness.vibevoice import backend
from harness.vibevoice.process import access_control
from harness.vibevoice.sessions.failures import described

NO_LATENT = np.zeros((1, wire.LATENT_SIZE), np.float32)
NO_SEMANTIC = np.zeros((1, wire.SEMANTIC_SIZE), np.float32)
_NOT_A_FRAME = np.full((1, 1), wire.TOKEN_SPEECH_BEGIN, np.int32)
_NO_TOKENS = np.zeros((1, 1), np.int32)
_PARAMETERS = access_control.as_parameters(access_control.server_key())


async def call(model: str, inputs: dict[str, np.ndarray], outputs: list[str], session: int = 0, flags: int = 0):
    """Call a model; returns its outputs as arrays in the order of their names. Raises StageError or Busy."""
    try:
        answer = await _request(model, inputs, outputs, session, flags).async_exec()
    except pb.TritonModelException as error:
        raise described(_without_id(str(error), session)) from None
    return _outputs(answer, outputs, session)


def call_here(model: str, inputs: dict[str, np.ndarray], outputs: list[str], session: int = 0):
    """``call`` in the caller's own thread, which waits for the response: no other thread needs to be woken."""
    try:
        answer = _request(model, inputs, outputs, session).exec()
    except pb.TritonModelException as error:
        raise described(_without_id(str(error), session)) from None
    return _outputs(answer, outputs, session)


def _request(model: str, inputs: dict[str, np.ndarray], outputs: list[str], session: int, flags: int = 0):
    return pb.InferenceRequest(
        model_name=model,
        inputs=[pb.Tensor(name, value) for name, value in inputs.items()],
        requested_output_names=outputs,
        correlation_id=session,
        flags=flags,
        parameters=_PARAMETERS,
    )


def _without_id(message: str, session: int) -> str:
    """Remove the session id from a message of Triton: anyone who knows it could end the session."""
    return message.replace(f" {session}", "") if session else message


def _outputs(answer, names: list[str], session: int) -> list[np.ndarray]:
    if answer.has_error():
        raise described(_without_id(answer.error().message(), session))
    return [pb.get_output_tensor_by_name(answer, name).as_numpy() for name in names]


async def tell_llm(session: int, inputs: dict[str, np.ndarray], flags: int = 0) -> None:
    """A call of the LLM stage other than a step: it opens a session or adds to its prompt or its past."""
    await call(wire.LLM, inputs, [wire.TOKEN], session, flags)


async def close_llm(session: int) -> None:
    await tell_llm(session, {wire.TOKEN_IDS: _NO_TOKENS}, backend.END)


async def open_vocoder(session: int, state: np.ndarray | None) -> None:
    """Open a session from silence, or from a convolution state [values]."""
    inputs = {wire.LATENT: NO_LATENT, wire.TOKEN: _NOT_A_FRAME}
    if state is not None:
        inputs[wire.STATE] = state[None]
    await call(wire.VOCODER, inputs, [wire.SEMANTIC], session, backend.START)


async def close_vocoder(session: int) -> np.ndarray:
    """Close a session; returns its convolution state [values]."""
    inputs = {wire.LATENT: NO_LATENT, wire.TOKEN: _NOT_A_FRAME}
    (state,) = await call(wire.VOCODER, inputs, [wire.STATE], session, backend.END)
    return state[0]
