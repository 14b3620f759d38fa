"""Steps of a stage as CUDA graphs: recorded once for each batch size, then launched as one.

A frame of VibeVoice-1.5B is over two thousand small kernels; launched one by one, they kept an H100 busy for a sixth of
the time (results/gpu). A graph has fixed shapes and addresses: its inputs are copied to where it reads them, and a
batch between two recorded sizes is filled up with rows of zeros, whose answers are dropped.
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
    """An input of a step: the sizes and type of one row, and the row that fills a batch up (None: zeros).

    ``on_device``: it is given on the device; a batch is then filled up with rows of the steps before.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    filler: torch.Tensor | None = None
    on_device: bool = False


@dataclass(frozen=True)
class Recorded:
    """A graph and the tensors that it leaves its outputs in."""

    graph: torch.cuda.CUDAGraph
    outputs: tuple[torch.Tensor, ...]


class Graphs:
    """``compute(*inputs [batch, …], variant) -> outputs [batch, …]``, recorded for each batch size and variant.

    All that ``compute`` does must happen on the device, with shapes that follow from batch and variant alone. What it
    writes elsewhere than into its outputs, it must be allowed to write once more than it is asked to.
    Raises ServerError where the device refuses to record it.
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
        for batch in reversed(self.batches):  # the largest first: the others find room in its memory
            for variant in reversed(self.variants):
                self._recorded[batch, variant] = self._record(compute, batch, variant, memory)
        memory.free()

    def __call__(self, *given: torch.Tensor, variant: int = 0) -> tuple[torch.Tensor, ...] | None:
        """The first rows of the outputs, where the graph left them: the next call overwrites them.

        None where no graph is recorded for so many rows, or for a variant that is as large.
        """
        rows = len(given[0])
        batch = next((size for size in self.batches if size >= rows), None)
        taken = next((each for each in self.variants if each >= variant), None)
        if batch is None or taken is None:
            return None
        for each, one in zip(self.inputs, given, strict=True):
            if one.shape != (rows, *each.sizes):  # a copy would spread it over the rows in silence
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
    """So many rows on the host, from where a GPU can copy by itself."""
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

    A stream each would keep workspaces of cuBLAS, and what the allocator has cached, for each graph.
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
        """Give back what the recording has cached."""
        if self.stream is not None:
            torch.cuda.empty_cache()


@torch.inference_mode()
def record(step: Callable[[], tuple[torch.Tensor, ...]], memory: Memory) -> Recorded:
    """Run a step once, for what is compiled or set up at the first time, then record it."""
    graph, device, stream = torch.cuda.CUDAGraph(), memory.device, memory.stream
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize(device)
        graph.capture_begin(pool=memory.pool, capture_error_mode="thread_local")
        try:
            outputs = step()
        except Exception:
            with contextlib.suppress(RuntimeError):  # it fails for what has failed before
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.synchronize(device)
    return Recorded(graph, outputs)
