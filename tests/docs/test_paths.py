"""Every file, folder and module that a text of the repository names exists."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("harness", "benchmarks", "docs", "scenarios", "tests", "model_repository", "notebooks", "ops")
TEXTS = {".py", ".md", ".yaml", ".yml", ".sh", ".j2", ".html", ".ipynb", ".toml", ".txt", ".pbtxt"}
SUFFIXES = "py|md|ya?ml|sh|ipynb|json|jsonl|html|css|js|j2|pbtxt|toml|txt|csv"
PATH = re.compile(
    rf"(?<![\w./${{<-])((?:{'|'.join((*FOLDERS, 'results'))})/[\w./-]*(?:\.(?:{SUFFIXES})\b|/))(?![\w<{{*])"
)
MODULE = re.compile(r"(?<![\w./-])harness(?:\.[a-z]\w*)+")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
WRITTEN = {"harness/commit.txt"}  # into a wheel, by setup.py
# files, and folders of a wheel
NO_MODULES = ("harness.pth", "harness.model_repository", "harness.scenarios", "harness.ops")


def texts() -> Iterator[Path]:
    """The texts that people write: not what was measured, which names files as they were then."""
    yield from (path for path in ROOT.iterdir() if path.suffix in TEXTS or path.name == "Makefile")
    yield ROOT / "results" / "gpu" / "README.md"
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in TEXTS and "__pycache__" not in path.parts and path.is_file():
                yield path


def missing_modules(text: str) -> list[str]:
    return [name for name in MODULE.findall(text) if not name.startswith(NO_MODULES) and not _is_there(name)]


def _is_there(name: str) -> bool:
    """Whether a dotted name leads to a module; what follows a module is its own."""
    place = ROOT
    for part in name.split("."):
        if (place / f"{part}.py").is_file():
            return True
        if not (place / part).is_dir():
            return False
        place /= part
    return True


def missing_files(text: str) -> list[str]:
    places = (ROOT, ROOT / "benchmarks")  # both have a folder ops/
    named = (path for path in PATH.findall(text) if path not in WRITTEN)
    return [path for path in named if not any((place / path).exists() for place in places)]


def test_every_file_and_folder_that_a_text_names_exists():
    missing = {str(each.relative_to(ROOT)): missing_files(each.read_text(encoding="utf-8")) for each in texts()}
    assert len(missing) > 300 and {name: paths for name, paths in missing.items() if paths} == {}


def test_every_module_that_a_text_names_exists():
    named = {
        each: each.read_text(encoding="utf-8") for each in texts() if each.name != "CHANGELOG.md"
    }  # it names old ones
    missing = {str(each.relative_to(ROOT)): missing_modules(text) for each, text in named.items()}
    assert {name: modules for name, modules in missing.items() if modules} == {}


def test_every_link_of_the_page_about_gpus_leads_to_a_file():
    page = ROOT / "results" / "gpu" / "README.md"  # the only page that the tests of pages do not read
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (page.parent / link).exists()] == []


def test_a_name_of_nothing_is_found():
    gone = "/".join(("harness", "gone.py"))  # not whole here, where it would be found too
    assert missing_files(f"see `{gone}`, `harness/wire.py` and `{gone.removesuffix('.py')}/`") == [
        gone,
        gone.removesuffix(".py") + "/",
    ]
    assert missing_modules(f"``harness.wire.ENTRY`` and ``{'.'.join(('harness', 'gone', 'one'))}``") != []
