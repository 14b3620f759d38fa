"""A profile of a GPU that does not exist, with times that are easy to reckon with."""

import json

from harness import wire

LLM_MS, DIFFUSION_MS, VOCODER_MS = 8.0, 6.0, 5.0  # of one session alone
FRAME_MS = LLM_MS + DIFFUSION_MS + VOCODER_MS
MODEL = {"hidden_size": 1536, "kv_bytes_per_token": 28_672, "state_values": 7}
STAGES = {
    wire.LLM: [
        {"batch": 1, "context": 100, "ms": LLM_MS},
        {"batch": 1, "context": 10_100, "ms": LLM_MS + 1},
        {"batch": 16, "context": 100, "ms": 11.0},
        {"batch": 16, "context": 10_100, "ms": 27.0},
        {"batch": 32, "context": 10_100, "left_out": "out of memory"},
    ],
    "prefill": [
        {"tokens": 64, "context": 0, "ms": 8.0},
        {"tokens": 256, "context": 0, "ms": 10.0},
        {"tokens": 256, "context": 8_000, "ms": 18.0},
        {"tokens": 64, "context": 8_000, "ms": 9.0},
    ],
    wire.DIFFUSION: [
        {"batch": 1, "steps": 10, "ms": DIFFUSION_MS},
        {"batch": 16, "steps": 10, "ms": 9.0},
        {"batch": 16, "steps": 20, "ms": 18.0},
    ],
    wire.VOCODER: [{"batch": 1, "ms": VOCODER_MS}, {"batch": 16, "ms": 20.0}],
    wire.VOICE: [{"seconds": 3, "ms": 4.0}, {"seconds": 30, "ms": 13.0}],
}


def write(path, stages=STAGES, preset="1.5b", model=MODEL, device="NVIDIA H200"):
    about = {"schema": 1, "device": device, "preset": preset, "dtype": "bfloat16"}
    path.write_text(json.dumps(about | {"model": model, "stages": stages}))
    return path
