"""The KV cache limit of an LLM stage, in bytes, where the configuration leaves it to the stage."""

from __future__ import annotations

import json

from harness import wire
from harness.errors import InputError
from harness.vibevoice.process.parameters import number

HOST_BYTES = 8 << 30  # on a CPU
GPU_SHARE = 0.9  # of a GPU's memory; the rest is for fragmentation and kernels that are loaded late
PROCESS_BYTES = 5 << 29  # CUDA context, kernels and activations of one stage: 2.4 GiB on an H100 (results/gpu)
# CUDA graphs of up to GRAPH_BATCH sessions, in each process but the voice encoder's. An estimate: with a stream per
# graph they took 3.6 GiB on the H100; with a shared stream nobody has measured them. GPU_SHARE leaves room for that.
GRAPH_BYTES, GRAPH_BATCH = 1 << 30, 128
STAGED_PROCESSES, FUSED_PROCESSES = 4, 2  # on a GPU with one instance of everything, the voice encoder's included


def given_limit(given: dict[str, str]) -> int | None:
    """``kv_limit_bytes`` of a model's parameters, None for ``auto``. Raises InputError for any other text."""
    return None if given.get("kv_limit_bytes", wire.AUTO) == wire.AUTO else int(number(given, "kv_limit_bytes"))


def instances_on_a_gpu(model_config: str) -> int:
    """Processes of this model that share one GPU: Triton starts ``count`` of them on each of the group's GPUs."""
    return sum(group["count"] for group in json.loads(model_config)["instance_group"])


def gpu_room(
    total_bytes: int, weight_bytes: int, instances: int, graph_batch: int, processes: int = STAGED_PROCESSES
) -> int:
    """Bytes of KV cache for each of the ``instances`` that hold sessions on a GPU of ``total_bytes``.

    share x total - weights of all processes - memory of ``processes`` (with one instance) and their graphs of up to
    ``graph_batch`` sessions. Raises InputError if nothing is left.
    """
    processes += instances - 1
    taken = processes * PROCESS_BYTES + (processes - 1) * GRAPH_BYTES * min(graph_batch, GRAPH_BATCH) / GRAPH_BATCH
    room = GPU_SHARE * total_bytes - weight_bytes - taken
    if room <= 0:
        raise InputError(
            f"the model does not fit this GPU: its weights need {weight_bytes / 2**30:.1f} GiB and its processes about "
            f"{taken / 2**30:.1f} GiB, of {total_bytes / 2**30:.1f} GiB; choose a smaller preset, fewer instances or a "
            "larger GPU, set `graphs` of the stages to less (0: none), or set kv_limit_bytes explicitly"
        )
    return int(room / instances)
