"""The flags with which a server is started, and the shared memory that it takes."""

from __future__ import annotations

from pathlib import Path

from harness.deploy.config import GPU_SESSIONS, Configs

EXIT_TIMEOUT_S = 2
BACKEND_THREADS, GPU_BACKEND_THREADS = 512, 2 * GPU_SESSIONS + 64
STUB_MEMORY = 16 << 20  # bytes, taken at once by every process: a frame on its way takes about 40 KB
_STUB_START_S = 300


def shared_memory_needed(configs: Configs, gpus: int = 1) -> int:
    """Bytes that a server takes of shared memory: a region for each stage process and one of its own.

    ``gpus``: on so many, each with the instances that a configuration counts.
    """
    stages = [config for config in configs.values() if config.backend == "python"]
    counts = [max(1, sum(group.count or 1 for group in config.instance_group)) for config in stages]
    return (gpus * sum(counts) + 1) * STUB_MEMORY


def server_flags(models: Path, backends: Path, threads: int = BACKEND_THREADS) -> list[str]:
    """Flags that every start uses: loopback only, explicit model control, quick and quiet."""
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
        # Each call of a stage and each chunk sent holds a thread of its instance: with the default of 32, sessions
        # beyond that would wait for a thread while the stages idle.
        f"--backend-config=python,thread-pool-size={threads}",
        # What a stage's process shares with the server should not have to grow (from 1 MiB): a server with 16 streams
        # ended so, by a thread that still had the smaller mapping (2.51).
        f"--backend-config=python,shm-default-byte-size={STUB_MEMORY}",
        # The default of 30 s is too little on a busy host.
        f"--backend-config=python,stub-timeout-seconds={_STUB_START_S}",
        # Triton keeps the responses of a finished stream for the next one: after 90 minutes, half a gigabyte.
        "--grpc-infer-allocation-pool-size=0",
    ]
