"""The KV cache limit of an LLM stage, in bytes, where the configuration leaves it to the stage: see ``gpu_memory``."""

from __future__ import annotations

import json

from harness import wire
from harness.vibevoice.process.parameters import number

HOST_BYTES = 8 << 30  # on a CPU


def given_limit(given: dict[str, str]) -> int | None:
    """``kv_limit_bytes`` of a model's parameters, None for ``auto``. Raises InputError for any other text."""
    return None if given.get("kv_limit_bytes", wire.AUTO) == wire.AUTO else int(number(given, "kv_limit_bytes"))


def instances_on_a_gpu(model_config: str) -> int:
    """Processes of this model that share one GPU: Triton starts ``count`` of them on each of the group's GPUs."""
    return sum(group["count"] for group in json.loads(model_config)["instance_group"])
