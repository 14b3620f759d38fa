"""The generated parts of the reference are those of the code, and nothing of the code is left out of them."""

import importlib.util
import re

import pages
import pytest

from harness.drive import options
from harness.exit_codes import OF_COMMANDS, OF_COMPARISONS, OF_LOAD_TESTS, OF_VERDICT
from harness.records.summary import METRICS

spec = importlib.util.spec_from_file_location("generate", pages.ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda page: page.stem)
def test_a_page_of_the_reference_is_as_the_code_has_it(page):
    assert generate.filled(page.read_text()) == page.read_text(), "run `make reference`"


def test_every_generated_part_is_on_one_page():
    used = [name for page in generate.PAGES for name in re.findall(r"<!-- generated: (\S+) -->", page.read_text())]
    assert sorted(used) == sorted(generate.BLOCKS)


def test_a_change_of_the_code_changes_a_page(monkeypatch):
    page = pages.PAGES["docs/reference/metrics.md"]
    monkeypatch.setattr(generate, "METRICS", METRICS[1:])
    assert generate.filled(page) != page


def test_a_key_without_a_line_is_refused(monkeypatch):
    with pytest.raises(KeyError, match="seed"):
        generate.keys("PlanSpec", {key: line for key, line in generate.PLAN_KEYS.items() if key != "seed"})
    with pytest.raises(KeyError, match="sead"):
        generate.keys("PlanSpec", generate.PLAN_KEYS | {"sead": ""})
    monkeypatch.setattr(generate, "BENCHMARKS", {"Load": ("load/arrivals",)})
    with pytest.raises(KeyError, match="hops"):
        generate.benchmarks()


def test_every_metric_option_and_exit_code_is_there():
    texts = pages.PAGES["docs/reference/metrics.md"], pages.PAGES["docs/reference/cli.md"]
    assert all(f"| `{metric.name}` |" in texts[0] for metric in METRICS)
    assert all(re.search(rf"`{option}[ ,`]", texts[1]) for option in options.ARGUMENTS)
    codes = re.findall(r"(?m)^\| (\d+) \|", pages.PAGES["docs/reference/exit-codes.md"])
    assert codes == [*map(str, (*OF_VERDICT.values(), *OF_COMMANDS, *OF_COMPARISONS, *OF_LOAD_TESTS))]
