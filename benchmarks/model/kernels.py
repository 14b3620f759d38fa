"""What the compiler makes of the GPU kernels, for each architecture, dtype and model; needs no GPU.

Steps of the server's own code run as they would on a GPU, up to the launch: of the backbone and the head over layers,
contexts and batches, of the vocoder's towers over layers of every size.

variants        compiled kernels that all steps of a model need; KERNELS has their number, and more would mean that
                kernels are compiled during traffic. The towers have one for each size of a layer
registers       per thread, at most 255
shared KiB      shared memory per block: an sm_89 has 99 KiB
spills          bytes per thread that did not fit in registers, excluding arrays in the code
wide, cp.async  loads of 16 bytes, into registers and directly into shared memory
narrow          loads of less than 4 bytes, and of less than 16 directly into shared memory: must be 0 in steps;
                the towers read their states this way
32-bit          products of indices in 32 bits, which would overflow in a large cache: must be 0 in steps; the
                towers have small ones, of taps
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch

from harness import wire
from harness.errors import InputError
from harness.vibevoice.stages.backbone import Backbone, NoCache
from harness.vibevoice.stages.configuration import preset_config
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.towers import Tower

ARCHITECTURES = {"sm_80": 80, "sm_89": 89, "sm_90": 90}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KERNELS = {  # by module: the variants of each that a model needs
    "ragged": {"_attend_part": 1, "_combine": 1},
    # _gate: backbone and head; _modulate: the first layer, the others, the last norm
    "fused_rows": {"_add_norm": 1, "_angles": 1, "_turn": 1, "_gate": 2, "_modulate": 3, "_solve": 1},
}
VARIANTS = {kernel: count for kernels in KERNELS.values() for kernel, count in kernels.items()}
TOWER_KERNELS = "_block", "_mix", "_narrow", "_windows"
STEPS, TOWERS = "steps", "towers"
SHARED_BYTES = 99 << 10  # available to a block on every architecture
MUST_BE_0 = "spills", "narrow_loads", "products_of_32_bits"
LAYERS = range(28)
LENGTHS = [[0], [1], [7] * 16, [15, 16, 17], [511, 512, 513], [1500] * 33, [*[400] * 63, 8000], [3, 106_000]]
ROWS = 1, 2, 16, 33, 500  # of a step or a prompt part
_DEVICES = itertools.count(1)  # Triton caches compiled kernels by device: each model and architecture has its own
_LOAD = re.compile(r"ld\.global(?:\.(?!v\d|[bsuf]\d)[\w:]+)*(?:\.v(\d))?\.[bsuf](\d+)")
_ARRAY = re.compile(r"\.local [^\n;]*\[(\d+)\];")
_STACK_STEP = 16  # a stack's size is a multiple of this many bytes
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(?:\[[^;]*?\],\s*)?(0x[0-9a-f]+|\d+)")


@dataclass(frozen=True)
class Shape:
    """Heads of a model: those of queries, those of keys and values, and the size of each."""

    heads: int
    kv_heads: int
    size: int


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel; ``variants`` is the number of variants that the steps needed."""

    arch: str
    dtype: str
    shape: str
    kernel: str
    variants: int
    registers: int
    shared_bytes: int
    spills: int
    wide_loads: int
    async_copies: int
    narrow_loads: int
    products_of_32_bits: int
    compile_s: float


class _NoGPU:
    """Replaces Triton's driver: names a GPU, and has none."""

    def __init__(self, device: int, target):
        self.device, self.target = device, target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target


class Compiler:
    """Runs steps of the server's code and compiles their kernels instead of starting them."""

    def __init__(self):
        if os.environ.get("TRITON_INTERPRET"):
            raise InputError("TRITON_INTERPRET is set, and nothing would be compiled: unset it")
        if importlib.util.find_spec("triton") is None:
            raise InputError("the compiler is missing: pip install triton")
        import triton  # not above: tests load this file for its options, and import triton in their own way
        from triton.runtime.jit import JITFunction

        from harness.vibevoice.kernels import fused_rows, ragged
        from harness.vibevoice.stages import fused_towers

        self.modules = {"ragged": ragged, "fused_rows": fused_rows, TOWERS: fused_towers}
        self.triton, self.device = triton, 0
        launch = JITFunction.run
        JITFunction.run = lambda kernel, *values, **more: launch(kernel, *values, **{**more, "warmup": True})

    def facts(self, arch: str, dtype: str, preset: str) -> Iterator[Compiled]:
        """Each kernel as the steps of one model need it on one architecture."""
        ragged, shape = self.modules["ragged"], _shape(preset)
        self._aim(arch)
        began = time.perf_counter()
        ragged.prepare(shape.heads, shape.kv_heads, shape.size, DTYPES[dtype], torch.device("cpu"))
        seconds = time.perf_counter() - began
        for lengths in LENGTHS:
            self._step(shape, DTYPES[dtype], lengths)
        self._rows(preset, dtype)
        for module, kernels in KERNELS.items():
            for kernel in kernels:
                yield from self._compiled(module, kernel, arch, dtype, Path(preset).name, seconds)

    @torch.inference_mode()
    def _rows(self, preset: str, dtype: str) -> None:
        """The operations of the networks between their matrix products, without contents."""
        weights = Weights(preset, device="meta", dtype=dtype)
        backbone, head = Backbone(weights.backbone()), DiffusionStage(weights)
        backbone.rows = head.head.rows = self.modules["fused_rows"]
        like = {"device": "meta", "dtype": weights.dtype}
        for rows in ROWS:
            embeds = torch.empty(rows, weights.config.text_config.hidden_size, **like)
            facts = torch.empty(rows, 3, dtype=torch.long, device="meta")
            for positions in (facts[:, 2], torch.arange(rows, device="meta")):  # of a step, of a prompt part
                backbone(embeds, positions, NoCache())
            given = [torch.empty(rows, *each.sizes, device="meta") for each in head.graph_inputs()]
            head._graphed(*given, wire.DEFAULT_DIFFUSION_STEPS)

    def towers(self, arch: str, dtype: str, preset: str) -> Iterator[Compiled]:
        """Each kernel as the vocoder's towers of one model need it on one architecture: a step of one session.

        Without contents: the products between the kernels would take longer than the compiler.
        """
        self._aim(arch)
        weights = Weights(_shallow(preset, os.environ["TRITON_CACHE_DIR"]), device="meta", dtype=dtype, plain=True)
        plain = Tower(weights.acoustic_decoder()), Tower(weights.semantic_encoder())
        like = {"device": "meta", "dtype": weights.dtype}
        inputs = torch.empty(1, 1, wire.LATENT_SIZE, **like), torch.empty(1, wire.SAMPLES_PER_FRAME, 1, **like)
        rows, began = torch.empty(1, dtype=torch.long, device="meta"), time.perf_counter()
        with torch.inference_mode():
            for tower, given in zip(plain, inputs, strict=True):
                states = torch.empty(2, tower.state_size, **like)
                self.modules[TOWERS].FusedTower(tower)(given, states, rows, rows)
        seconds = time.perf_counter() - began
        for kernel in TOWER_KERNELS:
            yield from self._compiled(TOWERS, kernel, arch, dtype, Path(preset).name, seconds)

    def _aim(self, arch: str) -> None:
        """Compile for this architecture everything that is started from here on."""
        self.device = next(_DEVICES)
        target = self.triton.backends.compiler.GPUTarget("cuda", ARCHITECTURES[arch], 32)
        self.triton.runtime.driver.set_active(_NoGPU(self.device, target))

    def _compiled(
        self, module: str, kernel: str, arch: str, dtype: str, name: str, seconds: float
    ) -> Iterator[Compiled]:
        variants = list(getattr(self.modules[module], kernel).device_caches[self.device][0].values())
        for variant in variants:
            yield Compiled(arch, dtype, name, kernel, len(variants), compile_s=seconds, **_measured(variant))

    def _step(self, shape: Shape, dtype: torch.dtype, lengths: list[int]) -> None:
        """One step of sequences of these lengths, with queries, keys and values as the backbone leaves them."""
        caches = [torch.empty(1, 2, shape.kv_heads, length + 9, shape.size, dtype=dtype) for length in lengths]
        made = torch.empty(len(lengths), shape.heads + 2 * shape.kv_heads, shape.size, dtype=dtype)
        turned = torch.empty_like(made[:, : -shape.kv_heads])
        query, key = turned.split((shape.heads, shape.kv_heads), 1)
        step = self.modules["ragged"].RaggedStep.of(caches, lengths)
        for layer in LAYERS:
            step.attend(layer, query, key, made[:, -shape.kv_heads :])


def _shallow(preset: str, folder: str) -> str:
    """A file of sizes that has one block where the preset has several of one size. Raises InputError."""
    towers = preset_config(preset).audio_config
    sizes = {"num_filters": towers.num_filters, "depths": [min(1, depth) for depth in towers.depths]}
    file = Path(folder) / "shallow.json"
    file.write_text(json.dumps(sizes))
    return str(file)


def _measured(variant) -> dict[str, int]:
    usage = _resources(variant.asm["cubin"])
    arrays = sum(-(-int(size) // _STACK_STEP) * _STACK_STEP for size in _ARRAY.findall(variant.asm["ptx"]))
    loads, copies = load_bytes(variant.asm["ptx"])
    return {
        "registers": usage["REG"],
        "shared_bytes": max(variant.metadata.shared, usage["SHARED"]),
        "spills": max(0, usage["STACK"] + usage["LOCAL"] - arrays),
        "wide_loads": loads.count(16),
        "async_copies": copies.count(16),
        "narrow_loads": sum(size < 4 for size in loads) + sum(size < 16 for size in copies),
        "products_of_32_bits": len(re.findall(r"arith\.muli .*: (?:tensor<[x\d]+xi32>|i32)\b", variant.asm["ttir"])),
    }


def load_bytes(ptx: str) -> tuple[list[int], list[int]]:
    """Bytes of each load of a thread from global memory: into registers, and directly into shared memory."""
    loads = [int(count or 1) * int(bits) // 8 for count, bits in _LOAD.findall(ptx)]
    return loads, [int(size, 0) for size in _COPY.findall(ptx)]


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes that a kernel uses, read from its binary by NVIDIA's tool in Triton's package."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


def _shape(preset: str) -> Shape:
    text = preset_config(preset).text_config
    heads = text.num_attention_heads
    return Shape(heads, text.num_key_value_heads, text.hidden_size // heads)


def _one_of(known: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        return text

    return parse


def main(arguments: Sequence[str]) -> int | None:
    parser = common.Parser(
        __doc__, "python benchmarks/model/kernels.py --arch sm_89,sm_90 --dtype bfloat16 --preset 7b"
    )
    parser.add_argument(
        "--arch", type=common.several(_one_of(ARCHITECTURES)), default=list(ARCHITECTURES), help="all by default"
    )
    parser.add_argument(
        "--dtype", type=common.several(_one_of(DTYPES)), default=["bfloat16", "float16"], help="also float32"
    )
    parser.add_argument("--preset", type=common.several(str), default=["1.5b", "7b"], help="also .json files of sizes")
    parser.add_argument(
        "--of",
        choices=(STEPS, TOWERS),
        default=STEPS,
        help="kernels of a frame step, or of the vocoder's towers (default: steps)",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.arch, options.dtype, options.preset = options.arch[-1:], options.dtype[:1], options.preset[:1]
    for preset in options.preset:
        preset_config(preset)  # an unknown one is refused before anything is compiled
    with tempfile.TemporaryDirectory() as cache:  # empty, so that compile times are those of a first start
        os.environ["TRITON_CACHE_DIR"] = cache
        compiler = Compiler()
        rows = [
            row
            for arch in options.arch
            for dtype in options.dtype
            for preset in options.preset
            for row in _rows(compiler, options.of, arch, dtype, preset)
        ]
    figures = _figures(rows)
    common.finish(_table(options.of, rows), figures)
    return None if _right(options.of, rows, figures) else common.EXIT_FAILED


def _rows(compiler: Compiler, of: str, arch: str, dtype: str, preset: str) -> Iterator[Compiled]:
    if of == TOWERS:
        return compiler.towers(arch, dtype, preset)
    return compiler.facts(arch, dtype, preset)


def _right(of: str, rows: list[Compiled], figures: dict) -> bool:
    if of == TOWERS:
        return not figures["spills"] and figures["shared_bytes"] <= SHARED_BYTES
    as_many = all(row.variants == VARIANTS[row.kernel] for row in rows)
    return as_many and not any(figures[name] for name in MUST_BE_0)


def _figures(rows: list[Compiled]) -> dict:
    """The worst of a model's variants, registers, shared bytes and seconds; sums of what must be 0; and each kernel."""
    models = {(row.arch, row.dtype, row.shape) for row in rows}
    return {
        "variants": max(sum((row.arch, row.dtype, row.shape) == model for row in rows) for model in models),
        **{name: sum(getattr(row, name) for row in rows) for name in MUST_BE_0},
        **{name: max(getattr(row, name) for row in rows) for name in ("registers", "shared_bytes", "compile_s")},
        "kernels": [asdict(row) for row in rows],
    }


def _table(of: str, rows: list[Compiled]):
    columns = "shared KiB", "spills", "wide", "cp.async", "narrow", "32-bit", "compile s"
    shown = common.table(f"Kernels of {of}", "kernel", "arch", "dtype", "model", "variants", "registers", *columns)
    for row in rows:
        facts = row.spills, row.wide_loads, row.async_copies, row.narrow_loads, row.products_of_32_bits
        what = row.kernel, row.arch, row.dtype, row.shape, row.variants, row.registers, f"{row.shared_bytes / 1024:.1f}"
        shown.add_row(*map(str, (*what, *facts)), f"{row.compile_s:.1f}")
    return shown


if __name__ == "__main__":
    common.run(main)
