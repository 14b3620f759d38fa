"""Steps of a stage as CUDA graphs: recorded once for each batch size, then launched as one.

A frame of VibeVoice-1.5B consists of over two thousand small kernels; launched one by one, they kept an H100 busy for a
sixth of the time (results/gpu). A graph has fixed shapes and addresses: its inputs are copied to the addresses that it
reads, and a batch between two recorded sizes is padded with rows of zeros, whose results are dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from harness.errors import ServerError

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)

Compute = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Input:
    """An input of a step: sizes and type of one row, and the row that pads a batch (None: zeros).

    ``on_device``: the input is already on the device; a batch is then padded with rows of earlier steps.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    filler: torch.Tensor | None = None
    on_device: bool = False


@dataclass(frozen=True)
class Recorded:
    """A graph and its output tensors."""

    graph: torch.cuda.CUDAGraph
    outputs: tuple[torch.Tensor, ...]


class Graphs:
    """``compute(*inputs [batch, …], variant) -> outputs [batch, …]``, recorded for each batch size and variant.

    ``compute`` must do everything on the device, with shapes that depend on batch and variant alone. Memory other than
    its outputs may be written once more than requested. Raises ServerError where the device cannot record it.
    """

    def __init__(
        self,
        compute: Compute,
        inputs: Sequence[Input],
        device: torch.device,
        largest: int = BATCHES[-1],
        variants: Sequence[int] = (0,),
    ):
        self.batches, self.variants = [batch for batch in BATCHES if batch <= largest], sorted(variants)
        self.inputs, self.device = inputs, device
        most = max(self.batches, default=0)
        self._host = [None if each.on_device else _rows(each, most, device) for each in inputs]
        self._read = [torch.zeros(most, *each.sizes, dtype=each.dtype, device=device) for each in inputs]
        for host, read in zip(self._host, self._read, strict=True):
            if host is not None:
                read.copy_(host)
        self._recorded: dict[tuple[int, int], Recorded] = {}
        memory = Memory.of(device)
        for batch in reversed(self.batches):  # the largest first: the others reuse its memory
            for variant in reversed(self.variants):
                self._recorded[batch, variant] = self._record(compute, batch, variant, memory)
        memory.free()

    def __call__(self, *given: torch.Tensor, variant: int = 0) -> tuple[torch.Tensor, ...] | None:
        """The first rows of the outputs, in the graph's memory: the next call overwrites them.

        None where no recorded graph is large enough for the rows or the variant.
        """
        rows = len(given[0])
        batch = next((size for size in self.batches if size >= rows), None)
        taken = next((each for each in self.variants if each >= variant), None)
        if batch is None or taken is None:
            return None
        for each, one in zip(self.inputs, given, strict=True):
            if one.shape != (rows, *each.sizes):  # a copy would silently broadcast it over the rows
                raise ValueError(f"an input of {list(one.shape)} where {[rows, *each.sizes]} is read")
        for each, host, read, one in zip(self.inputs, self._host, self._read, given, strict=True):
            if host is None:
                read[:rows].copy_(one)
                continue
            host[:rows].copy_(one)
            _fill(each, host[rows:batch])
            read[:batch].copy_(host[:batch], non_blocking=True)
        recorded = self._recorded[batch, taken]
        recorded.graph.replay()
        return tuple(output[:rows] for output in recorded.outputs)

    def _record(self, compute: Compute, batch: int, variant: int, memory: Memory) -> Recorded:
        try:
            return record(lambda: compute(*(read[:batch] for read in self._read), variant), memory)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise ServerError(
                f"{self.device} cannot record a step of {batch} sessions as a CUDA graph: {error}; set the parameter "
                "`graphs` of this stage to a smaller batch, or to 0 for none"
            ) from error


def _rows(one: Input, count: int, device: torch.device) -> torch.Tensor:
    """This many rows on the host, in memory that a GPU can copy directly."""
    rows = torch.empty(count, *one.sizes, dtype=one.dtype, pin_memory=device.type == "cuda")
    _fill(one, rows)
    return rows


def _fill(one: Input, rows: torch.Tensor) -> None:
    if one.filler is None:
        rows.zero_()
    else:
        rows.copy_(one.filler.expand_as(rows))


@dataclass(frozen=True)
class Memory:
    """What the graphs of a stage share, since they run one after another: a pool, and the stream of their recording.

    With a stream each, every graph would keep its own cuBLAS workspaces and allocator cache.
    """

    device: torch.device
    stream: torch.cuda.Stream | None
    pool: tuple | None

    @classmethod
    def of(cls, device: torch.device) -> Memory:
        on_gpu = device.type == "cuda"
        return (
            cls(device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle())
            if on_gpu
            else cls(device, None, None)
        )

    def free(self) -> None:
        """Free what the recording has cached."""
        if self.stream is not None:
            torch.cuda.empty_cache()


@torch.inference_mode()
def record(step: Callable[[], tuple[torch.Tensor, ...]], memory: Memory) -> Recorded:
    """Run a step once, to trigger compilation and set-up, then record it."""
    graph, device, stream = torch.cuda.CUDAGraph(), memory.device, memory.stream
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize(device)
        graph.capture_begin(pool=memory.pool, capture_error_mode="thread_local")
        try:
            outputs = step()
        except Exception:
            with contextlib.suppress(RuntimeError):  # it fails again with the first error
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.synchronize(device)
    return Recorded(graph, outputs)
