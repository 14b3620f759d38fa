"""The flags with which a server is started, and the shared memory that it needs."""

from __future__ import annotations

from pathlib import Path

from harness.deploy.config import GPU_SESSIONS, Configs

EXIT_TIMEOUT_S = 2
BACKEND_THREADS, GPU_BACKEND_THREADS = 512, 2 * GPU_SESSIONS + 64
STUB_MEMORY = 16 << 20  # bytes, allocated at start by every process: a frame in transit takes about 40 KB
START_S = 300.0  # time limit of a start, where CPUs are free
MOST_STRETCH = 4.0  # of it, where they are not
_STUB_START_S = 1500
_STUB_GROWTH = 64 << 20


def shared_memory_needed(configs: Configs, gpus: int = 1) -> int:
    """Shared memory that a server needs, in bytes: a region per stage process and one of its own.

    ``gpus``: number of GPUs, each with the instances that a configuration counts.
    """
    stages = [config for config in configs.values() if config.backend == "python"]
    counts = [max(1, sum(group.count or 1 for group in config.instance_group)) for config in stages]
    return (gpus * sum(counts) + 1) * STUB_MEMORY


def server_flags(models: Path, backends: Path, threads: int = BACKEND_THREADS) -> list[str]:
    """The flags of every start: loopback only, explicit model control, short timeouts and little logging."""
    return [
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        "--log-info=false",
        # Each call of a stage and each chunk sent holds a thread of its instance: with the default of 32, further
        # sessions would wait for a thread while the stages are idle.
        f"--backend-config=python,thread-pool-size={threads}",
        # Avoids growth of the memory that a stage's process shares with the server (from 1 MiB): with 16 streams a
        # server crashed in a thread that still had the smaller mapping (2.51).
        f"--backend-config=python,shm-default-byte-size={STUB_MEMORY}",
        # The carry of a long task is larger (31 MiB after 90 minutes). It then grows at once by what several need, not
        # again and again by 1 MiB at every segment.
        f"--backend-config=python,shm-growth-byte-size={_STUB_GROWTH}",
        # Longer than our own limits, which end a start with its reason.
        f"--backend-config=python,stub-timeout-seconds={_STUB_START_S}",
        # Triton keeps the responses of a finished stream for reuse: after 90 minutes, half a gigabyte.
        "--grpc-infer-allocation-pool-size=0",
    ]
