"""This host's NVIDIA GPUs as reported by their driver (NVML): identity and current load."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import pynvml

from harness.identity import GpuSample

CONTROL_FILE = "/dev/nvidiactl"  # exists where a driver is loaded
Read = TypeVar("Read")


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``index`` is the driver's, as in ``nvidia-smi``."""

    index: int
    name: str
    uuid: str
    memory_bytes: int
    free_bytes: int
    driver: str


class DriverError(Exception):
    """The host has an NVIDIA driver that does not answer; the message is the driver's own."""


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this host; empty without a driver. Raises DriverError if the driver does not answer."""
    try:
        _open()
        version = pynvml.nvmlSystemGetDriverVersion()
        return tuple(_gpu(index, version) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        if os.path.exists(CONTROL_FILE):
            raise DriverError(str(error)) from None
        return ()


def present() -> tuple[Gpu, ...]:
    """``gpus``, but empty if the driver does not answer: for records that can do without."""
    with contextlib.suppress(DriverError):
        return gpus()
    return ()


def visible() -> tuple[Gpu, ...]:
    """The GPUs that processes started here may use, in CUDA's order (CUDA_VISIBLE_DEVICES)."""
    found, allowed = present(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return found
    chosen = []
    for part in filter(None, (part.strip() for part in allowed.split(","))):
        match = [gpu for gpu in found if part == str(gpu.index) or gpu.uuid.startswith(part)]
        if len(match) != 1:
            break  # CUDA ignores everything from the first unknown entry on
        chosen += match
    return tuple(chosen)


def load() -> tuple[GpuSample, ...]:
    """The load of every GPU of this host; None for values that a GPU does not report (such as a MIG instance)."""
    try:
        _open()
        return tuple(_sample(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()


@lru_cache
def _open() -> None:
    """Initialise NVML once per process and leave it open: on a host with many GPUs it takes a tenth of a second."""
    pynvml.nvmlInit()


def _gpu(index: int, driver: str) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    return Gpu(index, name, uuid, memory.total if memory else 0, memory.free if memory else 0, driver)


def _sample(index: int) -> GpuSample:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    rates = _told(pynvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    milliwatts = _told(pynvml.nvmlDeviceGetPowerUsage, handle)
    return GpuSample(
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        percent=None if rates is None else float(rates.gpu),
        memory_bytes=None if memory is None else int(memory.used),
        power_w=None if milliwatts is None else milliwatts / 1000,
    )


def _told(read: Callable[..., Read], handle) -> Read | None:
    try:
        return read(handle)
    except pynvml.NVMLError:
        return None
