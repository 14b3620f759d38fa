"""What the doctor says of hosts that are not this one: each fault on a line of its own, with its fix."""

import sys
from pathlib import Path

import pytest

from harness import wire
from harness.cli import doctor
from harness.cli.doctor import GpuFacts, HostResources
from harness.client.target import Target
from harness.deploy.config import Deployment
from harness.deploy.flags import shared_memory_needed
from harness.host import nvml, packages
from harness.identity import StageIdentity

GIB, MIB = 1 << 30, 1 << 20
H100 = GpuFacts("NVIDIA H100 80GB HBM3", "580.159.04", 80 * GIB, 79 * GIB)
FINE = HostResources(
    cores=16, memory_free=100 * GIB, disk_free=60 * GIB, shared_free=GIB, gpu_device=True, gpus=(H100,),
    torch_cuda="13.0", compiler="/usr/bin/gcc", python_header=Path(__file__),
)  # fmt: skip


def host(**other) -> HostResources:
    return HostResources(**{**vars(FINE), **other})


def lines(checks) -> dict[str, doctor.Check]:
    found = {check.what: check for check in checks}
    assert all(check.fix for check in found.values() if not check.fine), found
    return found


def test_nothing_is_wrong_with_a_fine_host():
    found = lines([*doctor.machine(FINE), *doctor.gpus(FINE)])
    assert all(check.fine and not check.fix for check in found.values())
    assert found["GPU 0"].found == "NVIDIA H100 80GB HBM3, 80.0 GiB, 79.0 GiB free"


def test_a_host_without_a_gpu_is_said_and_is_no_fault():
    found = lines(doctor.gpus(host(gpu_device=False, gpus=(), torch_cuda="")))
    assert list(found) == ["GPU"] and found["GPU"].fine is None


def test_a_driver_that_does_not_answer_is_a_fault():
    found = lines(doctor.gpus(host(gpus=())))
    assert list(found) == ["GPU driver"] and found["GPU driver"].fine is False


def test_a_cpu_build_of_torch_beside_a_gpu_is_a_fault():
    found = lines(doctor.gpus(host(torch_cuda="")))["torch on the GPU"]
    assert found.fine is False and "stages would refuse to start" in found.found


@pytest.mark.parametrize(
    ("short", "what", "fix"),
    [
        ({"compiler": ""}, "C compiler", "apt install gcc"),
        ({"python_header": Path("/nowhere/Python.h")}, "Python.h", f"apt install python3.{sys.version_info[1]}-dev"),
    ],
)
def test_a_gpu_host_needs_what_builds_a_kernels_launcher(short, what, fix):
    found = lines(doctor.gpus(host(**short)))
    assert {name for name, check in found.items() if not check.fine} == {what} and fix in found[what].fix
    assert what not in lines(doctor.gpus(host(gpu_device=False, gpus=(), torch_cuda="", **short)))


def test_the_compiler_is_the_one_that_triton_takes(tmp_path, monkeypatch):
    for name in ("gcc", "clang", "mycc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert doctor._compiler() == str(tmp_path / "gcc")
    (tmp_path / "gcc").unlink()
    assert doctor._compiler() == str(tmp_path / "clang")
    monkeypatch.setenv("CC", "mycc")
    assert doctor._compiler() == str(tmp_path / "mycc")
    monkeypatch.setenv("CC", "none")
    assert doctor._compiler() == ""


def test_the_header_is_that_of_the_python_that_runs(monkeypatch):
    found = doctor._python_header()
    assert found.name == "Python.h" and f"python3.{sys.version_info[1]}" in str(found)


def test_two_servers_on_this_host_are_listed_by_the_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "local_urls", lambda root: ["127.0.0.1:1", "127.0.0.1:2"])
    check = doctor._server(Path())
    assert check.fine is None and check.found == "127.0.0.1:1, 127.0.0.1:2" and "--url" in check.fix


def test_each_gpu_has_its_line_and_a_full_one_is_warned_of():
    full = GpuFacts("NVIDIA L4", "580.1", 23 * GIB, 2 * GIB)
    found = lines(doctor.gpus(host(gpus=(H100, full))))
    assert found["GPU 0"].fine is True and found["GPU 1"].fine is None
    assert "2.0 GiB free" in found["GPU 1"].found and "12.0 GiB" in found["GPU 1"].fix


@pytest.mark.parametrize(("free_mib", "gpus", "fine"), [(64, 1, False), (96, 1, True), (96, 2, False), (1024, 8, True)])
def test_shared_memory_is_held_against_what_the_stage_processes_take(free_mib, gpus, fine):
    found = lines(doctor.machine(host(shared_free=free_mib * MIB, gpus=(H100,) * gpus)))["shared memory"]
    assert found.fine is fine and f"{16 * (5 * gpus + 1)} MiB needed" in found.found
    assert fine or "--shm-size=1g" in found.fix


def test_more_instances_take_more_shared_memory():
    plain, more = Deployment().configs(), Deployment(knobs={"diffusion_decoder.instances": 3}).configs()
    assert shared_memory_needed(more) - shared_memory_needed(plain) == 2 * 16 * MIB


@pytest.mark.parametrize(
    ("short", "what"),
    [({"cores": 1}, "cores"), ({"memory_free": GIB}, "memory"), ({"disk_free": MIB}, "disk")],
)
def test_what_is_short_is_named(short, what):
    wrong = {check.what for check in doctor.machine(host(**short)) if not check.fine}
    assert wrong == {what}


def package(folder, name, version, cuda="None"):
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if name == "torch":
        (folder / "torch").mkdir()
        (folder / "torch" / "version.py").write_text(f"__all__ = []\ncuda: Optional[str] = {cuda}\nhip = None\n")


def lowest(requirement) -> str:
    return next(each.version for each in requirement.specifier if each.operator in (">=", "=="))


def test_packages_at_their_lower_bounds_are_fine_and_each_other_is_a_line(tmp_path):
    asked = packages.required()
    for each in asked:
        if each.name != "optuna":
            package(tmp_path, each.name, {"plotly": "5.24.1", "numpy": "2.5.2"}.get(each.name, lowest(each)))
    found = lines(doctor.software((str(tmp_path),), (3, 12)))
    assert {what for what, check in found.items() if not check.fine} == {"stages' numpy", "plotly", "optuna"}
    assert "numpy 1" in found["stages' numpy"].fix
    assert "plotly 5.24.1" in found["plotly"].fix and "plotly>=6" in found["plotly"].fix
    assert "optuna is not installed" in found["optuna"].fix
    assert all("pip install" in found[what].fix for what in ("stages' numpy", "plotly", "optuna"))


def test_a_python_of_another_version_is_a_fault():
    assert lines(doctor.software((), (3, 13)))["Python"].fine is False


@pytest.mark.parametrize(("cuda", "said"), [("None", ""), ("'13.0'", "13.0")])
def test_the_cuda_of_torch_is_read_without_importing_it(tmp_path, cuda, said):
    package(tmp_path, "torch", "2.13.0", cuda)
    assert doctor._cuda_of(packages.find("torch", [str(tmp_path)])) == said


def test_gpus_are_read_from_the_driver(monkeypatch):
    first = nvml.Gpu(0, "NVIDIA A", "GPU-a", 81559 * MIB, 81000 * MIB, "580.1")
    told = first, nvml.Gpu(1, "NVIDIA B", "GPU-b", 0, 5 * MIB, "580.1")
    monkeypatch.setattr(nvml, "gpus", lambda: told)
    assert doctor._gpus_found() == (
        GpuFacts("NVIDIA A", "580.1", 81559 * MIB, 81000 * MIB),
        GpuFacts("NVIDIA B", "580.1", 0, 5 * MIB),
    )
    monkeypatch.setattr(nvml, "gpus", lambda: ())
    assert doctor._gpus_found() == ()


@pytest.mark.parametrize("is_open", [True, False])
def test_open_model_control_of_a_server_is_a_fault_with_its_fix(monkeypatch, is_open):
    monkeypatch.setattr(doctor, "has_open_control", lambda channel, headers: is_open)
    check = doctor._control_of(Target.of("127.0.0.1:1"), "127.0.0.1:1")
    assert check.fine is not is_open and ("--grpc-restricted-protocol" in check.fix) is is_open


@pytest.mark.parametrize("topology", wire.TOPOLOGIES)
def test_the_topology_of_a_server_is_named(monkeypatch, topology):
    models = [model for model in wire.TOPOLOGIES[topology] if model not in (wire.FRAME, wire.ENTRY)]
    told = [StageIdentity(model, "0", "cpu", "cpu", dtype="float32", preset="tiny") for model in models]
    preset = "" if topology == wire.STAGED else "tiny"
    told.append(StageIdentity(wire.ENTRY, "0", "cpu", "cpu", dtype="float32", preset=preset))
    monkeypatch.setattr(doctor, "stages_of", lambda *_: tuple(told))
    check = doctor._stages_of(Target.of("127.0.0.1:1"), "127.0.0.1:1")
    assert (check.fine, check.found) == (True, f"{topology}, cpu, float32, preset tiny")
