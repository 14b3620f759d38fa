"""The kit for a GPU host without a network: what goes into it, in which parts, and that it installs from them alone."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
MIB = 1 << 20


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import kit

    return kit


def test_its_help_ends_with_an_example_and_a_mistake_is_one_line(kit, capsys):
    with pytest.raises(SystemExit, match="0"):
        kit.main(["--help"])
    assert "Example:\n  python benchmarks/gpu/kit.py --out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="64"):
        kit.main(["--nonsense"])
    assert "--nonsense" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("numpy==2.5.2\ntorch\n# a remark\n\n", {"numpy": "2.5.2", "torch": ""}),
        ("Package    Version\n---------- -------\nPyYAML     6.0.1\n", {"pyyaml": "6.0.1"}),
        ("zope.event==6.2\ntyping_extensions\n", {"zope-event": "6.2", "typing-extensions": ""}),
    ],
)
def test_what_the_host_has_is_read_from_any_form_of_pip_list(kit, tmp_path, text, found):
    path = tmp_path / "host.txt"
    path.write_text(text)
    assert kit.host_packages(path) == found


def test_a_list_that_is_not_there_or_has_no_torch_is_an_error(kit, tmp_path, capsys):
    options = kit.parse(["--host", str(tmp_path / "none.txt")])
    with pytest.raises(kit.KitError, match="none.txt: No such file"):
        kit.missing(options)
    (tmp_path / "none.txt").write_text("numpy\n")
    with pytest.raises(kit.KitError, match="has no torch"):
        kit.missing(options)


@pytest.mark.parametrize(
    ("name", "version", "needs", "stays"),
    [
        ("scipy", "1.17.1", ["numpy<2.7,>=1.26.4"], True),
        ("scipy", "1.18.1", ["numpy<2.8,>=2.0.0"], False),
        ("pandas", "3.1.1", ['numpy>=2.0.2; python_version < "3.14"'], False),
        ("ml-dtypes", "0.5.4", ["numpy>=1.26.0", 'numpy>=2.1.0; python_version >= "3.13"'], True),
        ("pyarrow", "26.0.1", [], False),  # above the harness's bound
        ("scipy", "1.17.1", ['numpy>=2; extra == "test"'], True),
        ("numpy", "1.26.4", [], False),  # always carried
    ],
)
def test_a_package_of_the_host_stays_where_it_is_content_with_numpy_1(kit, name, version, needs, stays):
    asked = [Requirement("scipy>=1.12"), Requirement("pyarrow>=16,<22"), Requirement("numpy>=1.26.4,<2")]
    assert kit.suits(name, version, needs, asked, kit.parse([])) is stays


def test_lower_bounds_and_extras_hold_also_for_the_newest(kit):
    asked = [Requirement("tritonclient[grpc]>=2.53"), Requirement("numba<0.70,>=0.61"), Requirement("optuna")]
    assert [str(each) for each in kit.newest(asked)] == ["tritonclient[grpc]>=2.53", "numba>=0.61", "optuna"]


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("pytriton/tritonserver/bin/tritonserver", True),
        ("pytriton/tritonserver/python_backend_stubs/3.12/triton_python_backend_stub", True),
        ("pytriton/tritonserver/python_backend_stubs/3.13/triton_python_backend_stub", False),
        ("nvidia_pytriton.libs/libpython3-419a3a08.13.so.1.0", False),
        ("nvidia_pytriton.libs/libtritonserver-717102f0.so", True),
        ("nvidia_pytriton-0.7.0.dist-info/METADATA", True),
    ],
)
def test_the_server_is_cut_down_to_one_python(kit, name, needed):
    assert kit.is_needed(name, "3.12") is needed


def of_size(folder, name, mebibytes):
    path = folder / name
    with open(path, "wb") as file:
        file.truncate(mebibytes * MIB)
    return path


def test_parts_hold_everything_once_and_none_is_above_the_limit(kit, tmp_path):
    first = [of_size(tmp_path, "first", 30)]
    others = [of_size(tmp_path, f"{n}.whl", size) for n, size in enumerate((3, 40, 41, 20, 1, 22))]
    parts = kit.split(first, others, 64 * MIB)
    assert parts[0] == first and sorted(sum(parts[1:], [])) == sorted(others)
    options = kit.parse(["--out", str(tmp_path)])
    assert all(kit.write_part(options, n, files)["bytes"] <= 64 * MIB for n, files in enumerate(parts, 1))
    with pytest.raises(kit.KitError, match=r"big.whl 64.0 MiB"):
        kit.split(first, [of_size(tmp_path, "big.whl", 64)], 64 * MIB)


def test_the_list_of_the_kit_names_what_every_part_holds(kit, tmp_path):
    first = [of_size(tmp_path, "checkout.tar.xz", 1), of_size(tmp_path, "numpy-1.26.4-cp312.whl", 2)]
    others = [of_size(tmp_path, f"{n}.whl", 3) for n in range(3)]
    (tmp_path / "work").mkdir()
    (tmp_path / "out").mkdir()
    options = kit.parse(["--out", str(tmp_path / "out"), "--limit-mib", "7"])
    parts = kit.write_parts(tmp_path / "work", options, first, others)
    listed = json.loads((tmp_path / "work" / "kit.json").read_text())["parts"]
    assert list(listed) == [part["name"] for part in parts] == ["part-1.tar", "part-2.tar", "part-3.tar"]
    for name, files in listed.items():
        with tarfile.open(tmp_path / "out" / name) as archive:
            assert sorted(archive.getnames()) == sorted([*files, *(["kit.json"] if name == "part-1.tar" else [])])


@pytest.mark.parametrize("lacks", [("part-2.tar",), ("part-3.tar",), ("part-2.tar", "part-3.tar")])
def test_the_installer_names_the_parts_that_were_not_unpacked_and_installs_nothing(tmp_path, lacks):
    parts = {"part-1.tar": ["checkout.tar.xz"], "part-2.tar": ["wheels/a.whl", "wheels/b.whl"], "part-3.tar": ["c"]}
    (tmp_path / "wheels").mkdir()
    shutil.copy(FOLDER / "install.sh", tmp_path)
    plan = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "server": "0.7.0", "parts": parts}
    (tmp_path / "kit.json").write_text(json.dumps(plan))
    for files in [files for part, files in parts.items() if part not in lacks] + [parts["part-2.tar"][:1]]:
        for file in files:
            (tmp_path / file).write_text("")
    command = ["bash", tmp_path / "install.sh", "--python", sys.executable, tmp_path / "new"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 64 and done.stdout == "" and not (tmp_path / "new").exists()
    assert done.stderr.count("\n") == 1 and f"lacks files of {', '.join(lacks)}: " in done.stderr
    assert "Traceback" not in done.stderr and "all 3 parts" in done.stderr


def test_what_a_run_of_the_stages_needs_is_carried_even_where_the_host_lists_it(kit):
    """A list made after an earlier kit was tried there names that kit's client."""
    asked = [Requirement("tritonclient[grpc]>=2.53")]
    for name in ("tritonclient", "python-rapidjson", "numpy"):
        assert not kit.suits(name, "2.73.0", [], asked, kit.parse([]))


def test_the_installer_says_what_is_wrong_in_one_line(tmp_path):
    def said(*arguments):
        done = subprocess.run(["bash", FOLDER / "install.sh", *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert said("--help")[0] == 0 and "Examples:" in said("--help")[1]
    for arguments, words in (
        ([], "give the FOLDER"),
        (["--nonsense"], "unknown option"),
        ([tmp_path], "is there already"),
        ([tmp_path / "new"], "unpack part-1.tar, and all other parts"),
    ):
        code, text = said(*arguments)
        assert code == 64 and words in text and text.count("\n") == 1


CLIENT = ["numpy>=1.19", "protobuf<7,>=6.30; extra == 'grpc'", "ml-dtypes<=0.5.4", "pandas<3; extra == 'all'"]


def test_a_package_of_the_host_that_the_carried_ones_refuse_is_carried_in_another_version(kit):
    host = {"protobuf": "7.36.2", "ml-dtypes": "0.6.0", "pandas": "3.0.6", "numpy": "2.5.2", "rich": "15.0"}
    free = {"tritonclient": ("2.73.0", CLIENT), "protobuf": ("6.33.6", []), "ml-dtypes": ("0.5.4", ["rich<15"])}
    assert kit.agreeing(host, free, "3.12") == {"pandas": "3.0.6"}
    assert kit.agreeing({**host, "protobuf": "6.31.0"}, free, "3.12")["protobuf"] == "6.31.0"


def test_what_the_host_has_in_a_refused_version_is_not_taken_for_there(kit, tmp_path, monkeypatch):
    def resolve(asked, fixed, python):
        client = ("2.73.0", CLIENT)
        return {"tritonclient": client, **{name: (fixed.get(name, "6.33.6"), []) for name in ("protobuf", "rich")}}

    monkeypatch.setattr(kit, "resolve", resolve)
    (tmp_path / "host.txt").write_text("torch==2.11.0\nprotobuf==7.36.2\nrich==15.0\n")
    carried = kit.missing(kit.parse(["--host", str(tmp_path / "host.txt")]))
    assert carried == {"tritonclient": "2.73.0", "protobuf": "6.33.6"}


@pytest.mark.server
@pytest.mark.timeout(600)
def test_a_host_of_this_python_is_installed_from_the_parts_alone(tmp_path):
    """This environment is the host, as if it lacked Locust and plotly, and had nothing of Triton."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True
    )
    lacks = ("locust", "plotly", "tritonclient", "nvidia-pytriton", "numpy", "speech", "-e", "#")
    lines = [line for line in listed.stdout.splitlines() if "==" in line and not line.lower().startswith(lacks)]
    (tmp_path / "host.txt").write_text("\n".join(lines))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, FOLDER / "kit.py", "--out", tmp_path / "parts", "--python", version]
    built = subprocess.run([*command, "--host", tmp_path / "host.txt"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    parts = json.loads(built.stdout.splitlines()[-1])["parts"]
    assert all((tmp_path / "parts" / part["name"]).stat().st_size == part["bytes"] <= 64 * MIB for part in parts)
    carried = " ".join(name for part in parts for name in part["holds"])
    assert all(name in carried for name in ("numpy-1.26", "tritonclient-", "locust-", "plotly-", "libpython"))
    assert "torch-" not in carried and "transformers-" not in carried
    for part in parts:
        with tarfile.open(tmp_path / "parts" / part["name"]) as archive:
            archive.extractall(tmp_path / "kit", filter="data")
    install = ["bash", tmp_path / "kit" / "install.sh", "--python", sys.executable, tmp_path / "host"]
    done = subprocess.run(install, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "COLUMNS": "300"})
    assert done.returncode == 0, done.stdout + done.stderr
    stages = f"harness from {tmp_path / 'host'}"
    assert stages in done.stdout and f"{tmp_path / 'host' / '.venv'}" in done.stdout and "no  " not in done.stdout
    where = [tmp_path / "host" / ".venv" / "bin" / "python", "tests/where_server.py", tmp_path / "state"]
    facts = subprocess.run(where, cwd=tmp_path / "host", capture_output=True, text=True, timeout=170)
    assert facts.returncode == 0, facts.stdout + facts.stderr
    assert Path(json.loads(facts.stdout)["harness"]).is_relative_to(tmp_path / "host")
