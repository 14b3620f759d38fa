"""Commands about cards: what they print and write, their exit codes, and a usage error is one sentence."""

import json
import subprocess
import sys

import pytest
from report_page import Page
from typer.testing import CliRunner

from harness.cli.main import app
from harness.errors import InputError
from harness.records.estimate import PlanningEstimate

WIDE = {"COLUMNS": "200"}


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env=WIDE)


def flat(text):
    return " ".join(text.split())


def test_cards_are_listed_with_sources_and_with_what_fits():
    listed = run("cards")
    assert listed.exit_code == 0 and "h100-sxm" in listed.output and "NVIDIA L4 data sheet" in listed.output
    fits = flat(run("cards", "--preset", "1.5b").output)
    assert "Memory at preset 1.5b, fused (computed)" in fits and "staged (computed)" in fits
    assert "a10 24 9.1 512 27 3 90 min" in fits and "a10 24 2.2 229 6 0 68 min" in fits


def test_an_estimated_profile_is_written_and_shown_as_such(tmp_path):
    done = run("profile", "--estimate", "h100", "--preset", "1.5b", "--out", tmp_path)
    said, path = flat(done.output), tmp_path / "h100-sxm-1.5b-staged-estimated.json"
    assert done.exit_code == 0 and "NVIDIA H100 SXM (estimated)" in said and "Profile (estimated)" in said
    content = json.loads(path.read_text())
    assert content["basis"] == "estimated" and content["manifest"]["command"].startswith("harness profile --estimate")
    assert content["ranges"]["launch cost in a graph"] == [1.3, 2.2, 4.0]


def test_a_plan_for_cards_is_an_estimate_with_an_exit_code_of_its_own(tmp_path):
    done = run("plan", "--card", "h100,l40s,b200", "--qps", "1,10", "--out", tmp_path / "out")
    said = flat(done.output)
    assert done.exit_code == 2 and "Verdict: planning estimate" in said and "Would narrow it most" in said
    assert " met" not in said.lower().replace("time", "")
    found = PlanningEstimate.of(json.loads((tmp_path / "out" / "estimate.json").read_text()))
    assert [card.card for card in found.cards] == ["h100-sxm", "l40s", "b200"]
    accepted = run("plan", "--card", "h100", "--qps", "1", "--accept-estimates")
    assert accepted.exit_code == 0 and "Verdict: planning estimate" in flat(accepted.output)
    page = Page((tmp_path / "out" / "estimate.html").read_text())
    assert "planning estimate" in page.text.lower() and "estimated" in page.text and page.links == ["data:,"]
    assert {"tornado-0", "tornado-1", "tornado-2"} <= set(page.ids)
    counts = {row[0]: row[2] for row in page.tables[0] if row[1:2] == ["10"]}
    assert counts["NVIDIA H100 SXM"] == f"{found.cards[0].targets[-1].devices}"


def test_a_plan_for_cards_has_energy_and_with_prices_its_cost(tmp_path):
    """By hand: GPUs x 700 W, or x USD 2.5, over the audio of an hour at 10 requests/s of 279.5 s."""
    common = ["plan", "--card", "h100,l4", "--mix", "scenarios/mixes/mixed.yaml", "--qps", "10"]
    done = run(*common, "--price", "h100=2.5", "--currency", "EUR", "--out", tmp_path)
    said = flat(done.output)
    assert "Energy and cost (estimated)" in said and "EUR per audio hour" in said and "prices as given" in said
    found = PlanningEstimate.of(json.loads((tmp_path / "estimate.json").read_text()))
    (h100,), audio_h_per_h = found.cards[0].targets, 10 * (0.95 * 10 + 0.05 * 5400)
    assert (found.currency, found.cards[0].price_per_hour, found.cards[0].watts) == ("EUR", 2.5, 700)
    assert h100.kwh_per_audio_hour == pytest.approx(h100.devices * 0.7 / audio_h_per_h)
    assert h100.cost_per_audio_hour == pytest.approx(h100.devices * 2.5 / audio_h_per_h)
    assert h100.cost_per_audio_hour_interval[0] <= h100.cost_per_audio_hour <= h100.cost_per_audio_hour_interval[1]
    assert all(each.cost_per_hour is None and each.kwh_per_audio_hour for each in found.cards[1].targets)
    page = Page((tmp_path / "estimate.html").read_text())
    assert any("Energy and cost" in each and "estimated" in each for each in page.captions)
    bare = flat(run("plan", "--card", "l4", "--qps", "1").output)
    assert "kWh per audio hour" in bare and "EUR" not in bare and "--price h100=2.5 adds the cost" in bare


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan"], "give either --run DIR, for stored results, or --card"),
        (["plan", "--card", "h100", "--run", "results/x"], "give either --run DIR"),
        (["plan", "--card", "h1000"], "no card is named 'h1000': did you mean"),
        (["plan", "--card", ","], "give cards with commas between them"),
        (["plan", "--card", "h100", "--preset", "3b"], "no estimate for preset '3b'"),
        (["plan", "--card", "h100", "--price", "l40s=1"], "--price l40s: that is none of the cards h100-sxm"),
        (["plan", "--card", "h100", "--price", "h100=free"], "give TYPE=NUMBER with a number above 0"),
        (["plan", "--run", "results/x", "--price", "h100=1"], "are for --card: leave them out"),
        (["plan", "--card", "h100", "--mix", "none"], "--mix none: no such file, and no such mix"),
        (["plan", "--card", "h100", "--topology", "round"], "--topology round: use one of staged, fused"),
        (["plan", "--run", "results/x", "--mix", "shorts"], "are for --card: leave them out"),
        (["profile", "--from", "x.json"], "are for --estimate CARD"),
        (["profile", "--estimate", "h100", "--from", "none.json"], "none.json"),
        (["cards", "--preset", "big"], "no estimate for preset 'big'"),
    ],
)
def test_a_usage_error_is_one_sentence(arguments, says):
    done = run(*arguments)
    assert isinstance(done.exception, Exception) and says in str(done.exception)
    assert "\n" not in str(done.exception) and not isinstance(done.exception, KeyError)


def test_a_fused_profile_is_not_emulated_by_staged_stages(tmp_path):
    from harness.deploy.config import Deployment

    assert (
        run("profile", "--estimate", "l40s", "--topology", "fused", "--preset", "1.5b", "--out", tmp_path).exit_code
        == 0
    )
    with pytest.raises(InputError, match="is of the fused topology, which cannot be emulated"):
        Deployment("1.5b", emulate=str(tmp_path / "l40s-1.5b-fused-estimated.json"))
    run("profile", "--estimate", "l40s", "--preset", "1.5b", "--out", tmp_path)
    assert Deployment("1.5b", emulate=str(tmp_path / "l40s-1.5b-staged-estimated.json")).kind == "emulated"


def test_a_plan_for_cards_compiles_nothing_and_loads_no_torch():
    """It answers in seconds on a fresh checkout; compiling the simulator alone takes 15 to 40."""
    code = (
        "import sys; from typer.testing import CliRunner; from harness.cli.main import app; "
        "done = CliRunner().invoke(app, ['plan', '--card', 'h100,l40s,b200', '--qps', '1,10']); "
        "print(done.exit_code, [name for name in ('numba', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
