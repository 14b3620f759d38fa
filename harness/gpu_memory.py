"""What the processes of a server take of a GPU's memory, and what is left for KV caches."""

from __future__ import annotations

from harness.errors import InputError

GPU_SHARE = 0.9  # of a GPU's memory; the rest is for fragmentation and kernels that are loaded late
PROCESS_BYTES = 5 << 29  # CUDA context, kernels and activations of one stage: 2.4 GiB on an H100 (results/gpu)
# CUDA graphs of up to GRAPH_BATCH sessions, in each process but the voice encoder's. An estimate: with a stream per
# graph they took 3.6 GiB on the H100; with a shared stream nobody has measured them. GPU_SHARE leaves room for that.
GRAPH_BYTES, GRAPH_BATCH = 1 << 30, 128
STAGED_PROCESSES, FUSED_PROCESSES = 4, 2  # on a GPU with one instance of everything, the voice encoder's included


def taken_by_processes(processes: int, graph_batch: int) -> float:
    """Bytes that ``processes`` take beside weights and KV caches, with graphs of up to ``graph_batch`` sessions."""
    graphs = GRAPH_BYTES * min(graph_batch, GRAPH_BATCH) / GRAPH_BATCH
    return processes * PROCESS_BYTES + (processes - 1) * graphs


def gpu_room(
    total_bytes: int, weight_bytes: int, instances: int, graph_batch: int, processes: int = STAGED_PROCESSES
) -> int:
    """Bytes of KV cache for each of the ``instances`` that hold sessions on a GPU of ``total_bytes``.

    share x total - weights of all processes - memory of ``processes`` (with one instance) and their graphs of up to
    ``graph_batch`` sessions. Raises InputError if nothing is left.
    """
    taken = taken_by_processes(processes + instances - 1, graph_batch)
    room = GPU_SHARE * total_bytes - weight_bytes - taken
    if room <= 0:
        raise InputError(
            f"the model does not fit this GPU: its weights need {weight_bytes / 2**30:.1f} GiB and its processes about "
            f"{taken / 2**30:.1f} GiB, of {total_bytes / 2**30:.1f} GiB; choose a smaller preset, fewer instances or a "
            "larger GPU, set `graphs` of the stages to less (0: none), or set kv_limit_bytes explicitly"
        )
    return int(room / instances)
