"""The vocoder's towers as separate operations ("plain") and as fused kernels: time per step, difference from float32.

towers  ms of a step of each tower on the device, as replays of a CUDA graph (median); the largest difference from the
        plain tower in float32, as a share of its largest value; torch operators and Triton kernels per step
layers  ms of the fused tower's layers by kind and channels, each group as a separate graph
tiles   --tiles: ms of a block with few channels for each candidate tile, and as separate products

Needs torch, transformers and triton. On a CPU, Triton's interpreter runs the kernels: times mean nothing there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # before transformers imports Triton, whose functions are then interpreted
    os.environ["TRITON_INTERPRET"] = "1"

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from harness import wire  # noqa: E402
from harness.errors import HarnessError, InputError  # noqa: E402
from harness.vibevoice.process.setup import prepare  # noqa: E402
from harness.vibevoice.stages import fused_towers  # noqa: E402
from harness.vibevoice.stages.fused_towers import FusedTower, _States  # noqa: E402
from harness.vibevoice.stages.presets import DTYPES, Weights  # noqa: E402
from harness.vibevoice.stages.towers import StreamingBlock, Tower  # noqa: E402

EXIT_FAILED, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 64, 130
KERNELS = "_mix", "_block", "_narrow", "_windows"
MOST_DIFFERENT = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.15}  # of random weights: a fault is of size 1
REPLAYS, SETTLING = 30, 5
SLEEP_CYCLES = 2_000_000  # about 1 ms, so that the replays that follow are queued and none waits for the host
TILES = {
    32: [(64, 64, 4, 2, 7), (64, 64, 4, 2, 1), (64, 32, 4, 2, 7), (128, 64, 8, 2, 7), (64, 128, 4, 2, 7)],
    64: [(64, 32, 4, 2, 1), (64, 32, 4, 2, 2), (64, 64, 4, 2, 1), (128, 32, 8, 2, 1), (128, 64, 8, 2, 1)],
    128: [(64, 32, 8, 2, 1), (64, 64, 8, 2, 1), (64, 32, 8, 2, 2), (128, 64, 8, 2, 1), (32, 64, 4, 2, 1)],
    256: [(32, 32, 8, 2, 1), (64, 32, 8, 2, 1), (32, 32, 8, 3, 1)],
}
Call = Callable[[], object]


class Towers:
    """Both towers of one model, plain and fused, and a table of states for so many sessions."""

    def __init__(self, weights: Weights, most: int):
        self.device, self.dtype = weights.device, weights.dtype
        self.networks = {"decoder": weights.acoustic_decoder(), "encoder": weights.semantic_encoder()}
        self.plain = {name: Tower(network) for name, network in self.networks.items()}
        sizes = [tower.state_size for tower in self.plain.values()]
        places = itertools.accumulate(sizes[:-1], initial=0)
        self.places = dict(zip(self.plain, places, strict=True))
        self.fused = {name: FusedTower(tower, self.places[name]) for name, tower in self.plain.items()}
        self.table = self.draw(2 * most, sum(sizes))

    def draw(self, *sizes: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*sizes, generator=generator).to(self.device, self.dtype)

    def rows(self, sessions: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(2 * sessions, device=self.device)
        return rows[:sessions], rows[sessions:]

    def given(self, name: str, sessions: int) -> torch.Tensor:
        """A step's input [sessions, time, channels]."""
        sizes = {"decoder": (1, wire.LATENT_SIZE), "encoder": (wire.SAMPLES_PER_FRAME, 1)}
        return self.draw(sessions, *sizes[name])

    def state(self, name: str, sessions: int) -> torch.Tensor:
        """What the plain tower takes: [state_size, sessions]."""
        place, size = self.places[name], self.plain[name].state_size
        return self.table[:sessions, place : place + size].t().contiguous()


def towers_row(towers: Towers, name: str, sessions: int) -> dict:
    """Times and differences of one tower."""
    given, state, rows = towers.given(name, sessions), towers.state(name, sessions), towers.rows(sessions)
    turned = given.permute(2, 1, 0).contiguous()
    plain = lambda: towers.plain[name](turned, state)[0]  # noqa: E731
    fused = lambda: towers.fused[name](given, towers.table, *rows)  # noqa: E731
    exact = Tower(copy.deepcopy(towers.networks[name]).float())(turned.float(), state.float())[0].permute(2, 1, 0)
    return {
        "tower": name, "sessions": sessions, "plain_ms": median_ms(plain), "fused_ms": median_ms(fused),
        "plain_difference": difference(plain().permute(2, 1, 0), exact), "difference": difference(fused(), exact),
        **counted(fused),
    }  # fmt: skip


def difference(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact).abs().max() / exact.abs().max())


def layers_rows(towers: Towers, name: str, sessions: int) -> Iterator[dict]:
    """Times of a fused tower's layers, those of one kind and size together."""
    x, around = towers.given(name, sessions), _States(towers.table, *towers.rows(sessions))
    kind = lambda layer: (type(layer).__name__.strip("_"), layer.channels)  # noqa: E731
    for (what, channels), group in itertools.groupby(towers.fused[name].layers, kind):
        layers = list(group)

        def call(x=x, layers=layers):
            for layer in layers:
                x = layer(x, around)
            return x

        ms = median_ms(call)
        samples = x.shape[1]
        x = call()
        yield {"tower": name, "kind": what, "channels": channels, "samples": samples, "layers": len(layers), "ms": ms}


def tiles_rows(towers: Towers, sessions: int) -> Iterator[dict]:
    """Times of one block of the decoder for each candidate tile; None: separate products."""
    x, around = towers.given("decoder", sessions), _States(towers.table, *towers.rows(sessions))
    seen = set()
    for plain, layer in zip(towers.plain["decoder"].layers, towers.fused["decoder"].layers, strict=True):
        if isinstance(plain, StreamingBlock) and plain.channels in TILES and plain.channels not in seen:
            seen.add(plain.channels)
            yield from _tiles_of(plain, layer.place, x, around)
        x = layer(x, around)


def _tiles_of(plain: StreamingBlock, place: int, x: torch.Tensor, around: _States) -> Iterator[dict]:
    block, wide = fused_towers._FusedBlock(plain, place), fused_towers._WideBlock(plain, place)
    yield {"channels": plain.channels, "tile": None, "ms": median_ms(lambda: wide(x, around))}
    before = fused_towers.BLOCK_TILES[block.room]
    if block.known_as != fused_towers._GELU:
        exact = copy.copy(block)
        exact.known_as = fused_towers._GELU
        yield {"channels": plain.channels, "tile": (*before, "erf"), "ms": median_ms(lambda: exact(x, around))}
    for tile in TILES[plain.channels]:
        fused_towers.BLOCK_TILES[block.room] = tile
        found = {"channels": plain.channels, "tile": tile}
        try:
            yield found | {"ms": median_ms(lambda: block(x, around))}
        except Exception as error:  # a tile too large for this GPU is a finding; the others are tried
            yield found | {"ms": None, "error": " ".join(str(error).split())[:200]}
    fused_towers.BLOCK_TILES[block.room] = before


def median_ms(call: Call) -> float:
    """Median ms of a replay of a call as a CUDA graph; on a CPU, of the call itself."""
    if not ON_GPU:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    replay = captured(call).replay
    for _ in range(SETTLING):
        replay()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    torch.cuda._sleep(SLEEP_CYCLES)
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(next_one) for one, next_one in itertools.pairwise(marks))


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A call as a CUDA graph, after a first one that compiles its kernels. Raises what either raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


class _Operators(TorchDispatchMode):
    """Counts the computing torch operators, by name."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def counted(call: Call) -> dict[str, int]:
    """Kernels of Triton and computing operators of torch in one call."""
    started = []
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(_recorded(name, started))
        operators = stack.enter_context(_Operators())
        if not ON_GPU:  # the interpreter's own operators are not kernels
            for name in KERNELS:
                setattr(fused_towers, name, _Silent(name, started))
        call()
    return {"kernels": len(started), "operators": len(operators.names)}


class _Silent:
    """Replaces a kernel, and starts none."""

    def __init__(self, name: str, started: list[str]):
        self.name, self.started = name, started

    def __getitem__(self, grid):
        return lambda *_, **__: self.started.append(self.name)


@contextlib.contextmanager
def _recorded(name: str, started: list[str]) -> Iterator[None]:
    kernel = getattr(fused_towers, name)

    class Recorded:
        def __getitem__(self, grid):
            started.append(name)
            return kernel[grid]

    setattr(fused_towers, name, Recorded())
    try:
        yield
    finally:
        setattr(fused_towers, name, kernel)


def measured(towers: Towers, asked: argparse.Namespace) -> dict:
    rows = [towers_row(towers, name, sessions) for sessions in asked.sessions for name in towers.plain]
    layers = [row for name in towers.plain for row in layers_rows(towers, name, asked.layers_at)]
    tiles = list(tiles_rows(towers, asked.layers_at)) if asked.tiles else []
    return {"towers": rows, "layers": layers, "tiles": tiles}


# What is shown


def tables(figures: dict) -> str:
    parts = [f"{figures['device']}, preset {figures['preset']}, {figures['dtype']}"]
    for name in ("towers", "layers", "tiles"):
        if figures[name]:
            parts += ["", *_lines(figures[name])]
    return "\n".join(parts)


def _lines(rows: list[dict]) -> list[str]:
    cells = [[name.replace("_", " ") for name in rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*(row[: len(cells[0])] for row in cells), strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in itertools.zip_longest(row, widths, fillvalue=0))
            if len(row) == len(widths) else "  ".join(row) for row in cells]  # fmt: skip


def _cell(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# The command line


class Parser(argparse.ArgumentParser):
    """A usage error is one line and exit code 64."""

    def error(self, message: str):
        self.exit(EXIT_MISTAKE, f"{self.prog}: {message}; see --help\n")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,4}", part) and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 to 9999, as in 1,16,64")
    return [int(part) for part in parts]


def _number(text: str) -> int:
    numbers = _numbers(text)
    if len(numbers) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than one number")
    return numbers[0]


def parser() -> Parser:
    made = Parser(
        description=__doc__,
        epilog="Example:\n  python benchmarks/gpu/towers.py --preset 1.5b --sessions 1,16,64,128 --tiles",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--quick", action="store_true", help="a short run to check that it works; its figures mean nothing"
    )
    made.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b, or a .json file of sizes (default: tiny)")
    made.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="default: bfloat16")
    made.add_argument("--sessions", type=_numbers, default=[1, 16, 64, 128], help="default: 1,16,64,128")
    made.add_argument("--layers-at", type=_number, default=64, help="sessions of the layers and tiles (default: 64)")
    made.add_argument("--tiles", action="store_true", help="try the tiles of blocks of few channels")
    return made


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    asked = parser().parse_args(arguments)
    if not (ON_GPU or asked.quick):
        raise InputError("this machine has no CUDA device that torch can use, and times of Triton's interpreter say "
                         "nothing: give --quick")  # fmt: skip
    prepare()
    if asked.quick:
        asked.sessions, asked.layers_at, asked.tiles = [1], 1, False
    if not ON_GPU:
        asked.dtype = "float32"  # Triton's interpreter knows no products in bfloat16
        for name in ("MIX_VALUES", "WINDOW_VALUES", "NARROW_VALUES"):
            setattr(fused_towers, name, 1 << 15)
    weights = Weights(asked.preset, device="cuda" if ON_GPU else "cpu", dtype=asked.dtype, plain=True)
    towers = Towers(weights, max([*asked.sessions, asked.layers_at]))
    figures = {
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu", "preset": asked.preset, "dtype": asked.dtype,
        **measured(towers, asked),
    }  # fmt: skip
    print(tables(figures))
    print(json.dumps(figures, allow_nan=False), flush=True)
    right = all(row["difference"] < MOST_DIFFERENT[asked.dtype] for row in figures["towers"])
    return 0 if right else EXIT_FAILED


def run() -> int:
    try:
        return main(sys.argv[1:])
    except HarnessError as error:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE if isinstance(error, InputError) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
