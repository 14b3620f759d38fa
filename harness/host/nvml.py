"""This host's NVIDIA GPUs as their driver tells of them (NVML): what they are, and their load now."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import pynvml

from harness.records.schema import GpuSample

CONTROL_FILE = "/dev/nvidiactl"  # there wherever a driver is loaded
Read = TypeVar("Read")


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``index`` is its place among those of the driver, as ``nvidia-smi`` counts them."""

    index: int
    name: str
    uuid: str
    memory_bytes: int
    free_bytes: int
    driver: str


class DriverError(Exception):
    """The host has an NVIDIA driver that does not answer; the message is the driver's own."""


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this host, none where it has no driver. Raises DriverError where it has one that does not answer."""
    try:
        _open()
        version = pynvml.nvmlSystemGetDriverVersion()
        return tuple(_gpu(index, version) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        if os.path.exists(CONTROL_FILE):
            raise DriverError(str(error)) from None
        return ()


def present() -> tuple[Gpu, ...]:
    """``gpus``, none also where their driver does not answer: for records that go on without."""
    with contextlib.suppress(DriverError):
        return gpus()
    return ()


def visible() -> tuple[Gpu, ...]:
    """The GPUs that processes started here may use, in the order in which CUDA counts them (CUDA_VISIBLE_DEVICES)."""
    found, allowed = present(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return found
    chosen = []
    for part in filter(None, (part.strip() for part in allowed.split(","))):
        match = [gpu for gpu in found if part == str(gpu.index) or gpu.uuid.startswith(part)]
        if len(match) != 1:
            break  # CUDA takes none from the first that it does not know
        chosen += match
    return tuple(chosen)


def load() -> tuple[GpuSample, ...]:
    """What every GPU of this host does now; None for what one does not tell (a GPU in parts, say)."""
    try:
        _open()
        return tuple(_sample(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()


@lru_cache
def _open() -> None:
    """Once for the process, and left open: on a host of many GPUs it takes a tenth of a second."""
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
