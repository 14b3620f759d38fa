"""Every page of the documentation: its commands, links, plans and code, and the files and functions that it names."""

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import test_layers
import typer
import yaml

from harness.cards.card import read_cards
from harness.cli.main import app
from harness.drive.options import ARGUMENTS
from harness.planfile.reading import load_plan

ROOT = pages.ROOT
BENCHMARKS = (ROOT / "benchmarks", *(ROOT / "benchmarks").glob("*/"))
MAKE_FILE = (ROOT / "Makefile").read_text()
COMMANDS = typer.main.get_command(app).commands
WRITTEN = ("build/", ".venv", "results/profiles/", ".harness/")  # by commands


def of(program: str) -> list[tuple[str, str]]:
    """What pages call a program with, also inside another command: page, arguments."""
    found = ((page, re.findall(rf"(?:^|[A-Z_]=\S+ |\(){program} ([^)]+)", line)) for page, line in pages.commands())
    return [(page, arguments) for page, calls in found for arguments in calls]


@pytest.mark.parametrize(("page", "line"), of("harness"))
def test_a_command_has_these_options_and_files(page, line):
    name, *words = line.split()
    assert name in COMMANDS, f"{page}: harness has no command {name}"
    known = {option for each in COMMANDS[name].params for option in each.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, page
    files = [word for word in words if word.startswith(("scenarios/", "results/sample"))]
    assert all((ROOT / file).exists() for file in files), page


@pytest.fixture(scope="module")
def locust_help() -> str:
    done = subprocess.run([sys.executable, "-m", "locust", "--help"], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(("page", "line"), of("locust"))
def test_a_load_test_has_these_options_and_files(page, line, locust_help):
    short = {flag for about in ARGUMENTS.values() for flag in about.get("flags", ())}
    for word in line.split():
        option = word.partition("=")[0]
        if re.match(r"--?[a-z]", option) and option not in short:
            assert option in ARGUMENTS or re.search(rf"(?<![\w-]){option}[\s,]", locust_help), f"{page}: {option}"
    file = re.search(r"-f (\S+\.py)", line)
    assert file is None or file[1] == "SCENARIO.py" or (ROOT / file[1]).is_file(), page


@pytest.mark.parametrize(("page", "line"), of("make"))
def test_a_target_of_make_is_there(page, line):
    target = line.split()[0]
    assert re.search(rf"^{target}:", MAKE_FILE, re.MULTILINE), f"{page}: make {target}"


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in pages.links(pages.PAGES[page]):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in pages.anchors(target.read_text()), f"{page}: {link}"


def test_every_page_is_reached_from_the_readme_and_from_the_home_page():
    for start in ("README.md", "docs/index.md"):
        linked = {
            str(((ROOT / start).parent / link.partition("#")[0]).resolve()) for link in pages.links(pages.PAGES[start])
        }
        wanted = [page for page in pages.PAGES if page not in ("README.md", "docs/index.md")]
        missing = [page for page in wanted if str(ROOT / page) not in linked]
        assert missing in ([], ["CHANGELOG.md"]), start


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_file_that_a_page_names_is_there(page):
    for path in sorted(pages.paths(pages.PAGES[page])):
        places = [folder / path for folder in (ROOT, *BENCHMARKS, ROOT / "harness")]
        assert path.startswith(WRITTEN) or any(place.exists() for place in places), f"{page}: {path}"


@pytest.mark.parametrize(("page", "name", "file"), pages.names())
def test_a_name_that_a_page_gives_is_in_that_file(page, name, file):
    text = (ROOT / file).read_text()
    for part in name.split("."):
        assert re.search(rf"(?m)^\s*(?:(?:async )?def|class) {part}\b|^{part}\b.* = ", text), (
            f"{page}: {name} in {file}"
        )


def test_the_architecture_lists_every_package_in_the_order_of_imports():
    table = pages.PAGES["ARCHITECTURE.md"].partition("## Packages")[2].partition("\n## ")[0]
    named = [name for row in re.findall(r"(?m)^\| (`harness.+?) \|", table) for name in re.findall(r"`([^`]+)`", row)]
    places = [name.removeprefix("harness/").removesuffix("/").removesuffix(".py").replace("/", ".") for name in named]
    order = [place for line in test_layers.ORDER for place in line]
    ranks = [test_layers.RANKS[place] for place in places if place != test_layers.SERVER]
    assert sorted(places) == sorted([*order, test_layers.SERVER]) and ranks == sorted(ranks)


def test_pages_give_names():
    assert len(pages.names()) > 20 and len(of("harness")) > 40 and len(of("locust")) > 8 and len(of("make")) > 8


@pytest.mark.parametrize(("page", "text"), pages.blocks("yaml"))
def test_a_plan_in_a_page_passes(tmp_path, page, text):
    """A part of a plan passes in place of the same keys of the plan of the first answer; a list of cards is read."""
    given = yaml.safe_load(text)
    if "cards" in given:
        (tmp_path / "cards.yaml").write_text(text)
        assert read_cards(tmp_path / "cards.yaml").keys() == given["cards"].keys()
        return
    plan = given if "name" in given else yaml.safe_load((ROOT / "scenarios" / "quick.yaml").read_text()) | given
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    spec = load_plan(tmp_path / "plan.yaml")
    if page == "docs/how-to/gpu-host.md":
        assert (spec.preset, spec.device, spec.gpus) == ("1.5b", "gpu", 1)


def test_the_python_of_pages_is_locustfiles(tmp_path):
    """In a process of its own: Locust changes Python's modules."""
    blocks = pages.blocks("python")
    for number, (_, text) in enumerate(blocks):
        (tmp_path / f"file{number}.py").write_text(text)
    look = (
        "import importlib\n"
        "from harness.scenario import SpeechUser\n"
        f"for number in range({len(blocks)}):\n"
        "    found = vars(importlib.import_module(f'file{number}')).values()\n"
        "    kinds = [each for each in found if isinstance(each, type)]\n"
        "    (user,) = [each for each in kinds if issubclass(each, SpeechUser) and each is not SpeechUser]\n"
        "    assert user.mix.mean_audio_s() > 0"
    )
    done = subprocess.run([sys.executable, "-c", look], cwd=tmp_path, capture_output=True, text=True)
    assert blocks and done.returncode == 0, done.stderr


def test_every_command_is_documented():
    said = {line.split()[0] for page, line in of("harness") if page != "docs/reference/cli.md"}
    assert said >= COMMANDS.keys()


def test_pictures_are_small():
    pictures = list((ROOT / "docs").rglob("*.png"))
    assert pictures and all(each.stat().st_size < 150_000 for each in pictures)


def test_pages_say_nothing_of_a_machine():
    assert not [page for page, text in pages.PAGES.items() if re.search(r"/home/|/root/|/work/|/tmp/|C:\\", text)]
    assert all(Path(page).name.lower() == Path(page).name or page in pages.TOP for page in pages.PAGES)
