"""What is compiled for GPUs, on any machine: the kernels' loads, registers, shared memory and variants."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import InputError

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
ROOT = Path(__file__).resolve().parents[2]
ATTENTION = "_attend_part", "_combine"
VARIANTS = dict.fromkeys((*ATTENTION, "_add_norm", "_angles", "_turn", "_solve"), 1) | {"_gate": 2, "_modulate": 3}
# The bodies are the same, and a compilation takes half a minute: the GPU that is asked for most, and the smallest.
ARCHITECTURE_OF = {"bfloat16": "sm_90", "float16": "sm_89"}
SHARED_OF_SM_89 = 99 << 10  # bytes of a block, the least of all architectures that are compiled for


COMPILER = """
import json, sys
sys.path.insert(0, "benchmarks/model")
import kernels
for line in sys.stdin:
    code = kernels.main(json.loads(line))
    print(json.dumps({"exit": code or 0}), flush=True)
"""


@pytest.fixture(scope="module")
def compiled():
    """``compiled(*arguments)``: figures of benchmarks/model/kernels.py.

    In a process of its own, for other tests interpret the kernels; in one, for its imports take long.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, pipe = [sys.executable, "-c", COMPILER], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def figures(*arguments: str) -> dict:
            print(json.dumps(arguments), file=process.stdin, flush=True)
            last, line = "", process.stdout.readline()
            while line and not line.startswith('{"exit"'):
                last, line = line, process.stdout.readline()
            return json.loads(last) | json.loads(line)

        yield figures


@pytest.fixture(scope="module")
def of_every_architecture(compiled):
    return compiled("--dtype", "bfloat16", "--preset", "1.5b")


@pytest.fixture(scope="module")
def of_the_largest_heads(compiled, tmp_path_factory):
    """Heads of 256 in float32: the largest tiles."""
    sizes = tmp_path_factory.mktemp("kernels") / "wide.json"
    sizes.write_text(json.dumps({"hidden_size": 1536, "num_attention_heads": 6, "num_key_value_heads": 2}))
    return compiled("--arch", "sm_89", "--dtype", "float32", "--preset", str(sizes))


def test_the_variants_of_each_kernel_serve_all_layers_contexts_and_batches(of_every_architecture):
    kernels = of_every_architecture["kernels"]
    assert of_every_architecture["variants"] == sum(VARIANTS.values())
    assert {(row["arch"], row["kernel"], row["variants"]) for row in kernels} == {
        (arch, kernel, count) for arch in ("sm_80", "sm_89", "sm_90") for kernel, count in VARIANTS.items()
    }


def test_caches_and_rows_are_read_by_16_bytes_and_nothing_spills(of_every_architecture):
    assert of_every_architecture["exit"] == 0
    assert of_every_architecture["narrow_loads"] == of_every_architecture["spills"] == 0
    for row in of_every_architecture["kernels"]:
        small = row["kernel"] in ("_angles", "_solve")  # rows of 64: a few bytes a thread
        assert row["wide_loads"] >= (4 if row["kernel"] in ATTENTION else 0 if small else 2)
        # Keys and values go straight to shared memory.
        assert row["registers"] <= 128 and (row["async_copies"] >= 32 or row["kernel"] != "_attend_part")


def test_every_index_is_multiplied_in_64_bits(of_every_architecture, of_the_largest_heads):
    assert of_every_architecture["products_of_32_bits"] == of_the_largest_heads["products_of_32_bits"] == 0


def test_the_smallest_shared_memory_holds_the_largest_tiles(of_every_architecture, of_the_largest_heads):
    assert 0 < of_every_architecture["shared_bytes"] <= SHARED_OF_SM_89
    assert 0 < of_the_largest_heads["shared_bytes"] <= SHARED_OF_SM_89
    assert of_the_largest_heads["spills"] == of_the_largest_heads["narrow_loads"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_towers_kernels_fit_the_architectures(dtype, compiled):
    of_towers = compiled("--of", "towers", "--dtype", dtype, "--preset", "1.5b", "--arch", ARCHITECTURE_OF[dtype])
    assert of_towers["exit"] == of_towers["spills"] == 0
    assert 0 < of_towers["shared_bytes"] <= SHARED_OF_SM_89
    blocks = [row for row in of_towers["kernels"] if row["kernel"] == "_block"]
    assert [row["arch"] for row in blocks] == 2 * [ARCHITECTURE_OF[dtype]]  # of 32 and 64 channels
    assert all(row["wide_loads"] >= 7 and row["async_copies"] >= 4 for row in blocks)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "model"))
    return importlib.import_module("kernels")


def test_loads_are_counted_as_the_assembly_has_them(kernels):
    ptx = """
        @%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
        st.global.b16 [ %rd1 + 0 ], { %rs1 };
        cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
        cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x4, %r6;
        cp.async.commit_group;
    """
    assert kernels.load_bytes(ptx) == ([2, 16, 16], [16, 4])


def test_arrays_of_a_kernels_code_are_no_spills(kernels):
    """The cosine of a large angle takes one: NVIDIA's library reduces it by many digits of pi."""
    found = kernels._ARRAY.findall(
        ".local .align 4 .b8 \t__local_depot0[28];\n.reg .b32 %r<99>;\nld.local.b32 %r1, [%r2];"
    )
    assert found == ["28"]


def test_an_interpreter_that_would_compile_nothing_is_refused(kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # set by the script: put back afterwards
    with pytest.raises(InputError, match="TRITON_INTERPRET is set"):
        kernels.main(["--quick"])
