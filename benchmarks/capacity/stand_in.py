"""A synthetic profile of a GPU that nobody has measured.

Its times are lines over batch, context and prompt. They were chosen above what hops take on a small host: some 25
sessions of a few minutes saturate the GPU.
"""

from __future__ import annotations

from harness import wire

NAME = "stand-in GPU"
# milliseconds: per batch, per session in it; and per token of context of a session
TIMES_MS = {wire.LLM: (3.0, 1.0), wire.DIFFUSION: (5.0, 0.8), wire.VOCODER: (3.0, 1.2)}
TOKEN_MS = 0.00008
_BATCHES, _CONTEXTS, _PROMPTS = (1, 2, 4, 8, 16, 32, 64), (0, 10_000, 120_000), (64, 1024, 4096)


def profile() -> dict:
    """The profile in the format of ``harness profile``; its device name says what it is."""
    llm_ms, session_ms = TIMES_MS[wire.LLM]
    return {
        "schema": 1,
        "device": NAME,
        "preset": "tiny",
        "dtype": "none",
        "manifest": {
            "command": "benchmarks/capacity/stand_in.py",
            "notes": "lines that were made up: no GPU was measured",
        },
        "model": {"hidden_size": 64, "kv_bytes_per_token": 512, "kv_room_bytes": 8 << 30, "state_values": 5266},
        "stages": {
            wire.LLM: [
                {"batch": b, "context": c, "ms": llm_ms + b * (session_ms + c * TOKEN_MS)}
                for b in _BATCHES
                for c in _CONTEXTS
            ],
            "prefill": [{"tokens": t, "context": c, "ms": 1 + t / 100} for t in _PROMPTS for c in _CONTEXTS],
            wire.DIFFUSION: [{"batch": b, "steps": 10, "ms": _line(wire.DIFFUSION, b)} for b in _BATCHES],
            wire.VOCODER: [{"batch": b, "ms": _line(wire.VOCODER, b)} for b in _BATCHES],
            wire.VOICE: [{"seconds": seconds, "ms": 3.0 * seconds} for seconds in (3, 30)],
        },
    }


def _line(stage: str, batch: int) -> float:
    fixed, each = TIMES_MS[stage]
    return fixed + each * batch
