"""Cards by their data sheets: read strictly, and those that come with the harness are possible."""

import numpy as np
import pytest

from harness.cards.card import BANDWIDTH, FILE, THROUGHPUT, all_cards, card_of, own_cards, read_cards
from harness.cards.ranges import Range, draws_of
from harness.errors import InputError

ASKED = "a10 l4 l40s a100-40 a100-80 h100-sxm h100-pcie h100-nvl h200 b200 rtx-4090 rtx-pro-6000".split()
OWN = {
    "name": "Mine",
    "memory_gb": 48,
    "bandwidth_gb_s": 900,
    "bf16_tflop_s": 150,
    "power_w": 300,
    "source": "its data sheet",
}


def write(path, **cards):
    lines = ["cards:"]
    for key, card in cards.items():
        lines += [f"  {key}:", *(f"    {name}: {value}" for name, value in card.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_cards_that_plans_ask_for_are_there_with_their_sources():
    cards = own_cards()
    assert set(ASKED) <= cards.keys()
    assert all(card.source and card.key == key for key, card in cards.items())


@pytest.mark.parametrize(
    ("key", "sheet"),
    [
        ("h100-sxm", (80, 3350, 989, 1979, 1979, 700)),
        ("h200", (141, 4800, 989, 1979, 1979, 700)),
        ("b200", (180, 8000, 2250, 4500, 4500, 1000)),
        ("l40s", (48, 864, 362, 733, 733, 350)),
        ("l4", (24, 300, 121, 242, 242, 72)),
        ("a100-80", (80, 2039, 312, None, 624, 400)),
        ("rtx-4090", (24, 1008, 165, 330, 661, 450)),
    ],
)
def test_a_card_is_its_data_sheet_without_sparsity(key, sheet):
    card = own_cards()[key]
    given = card.memory_gb, card.bandwidth_gb_s, card.bf16_tflop_s, card.fp8_tflop_s, card.int8_top_s, card.power_w
    assert given == sheet


def test_what_was_measured_is_a_narrow_share_and_what_was_not_a_wide_one():
    h100, h200, l40s = (card_of(name).shares for name in ("h100", "h200", "l40s"))
    assert h100[BANDWIDTH].likely == pytest.approx(3000 / 3350) and h100[THROUGHPUT].likely == pytest.approx(798 / 989)
    assert h200[BANDWIDTH].likely == pytest.approx(4300 / 4800) and h200[THROUGHPUT].likely == pytest.approx(790 / 989)
    for unknown in (BANDWIDTH, THROUGHPUT):
        assert h100[unknown].width < 1.1 < l40s[unknown].width
        assert l40s[unknown].low < h100[unknown].likely < l40s[unknown].high


@pytest.mark.parametrize("name", ["h100", "H100-SXM", "nvidia h100 sxm", "NVIDIA H100 80GB HBM3"])
def test_a_card_has_several_names(name):
    assert card_of(name).key == "h100-sxm"


def test_an_unknown_card_is_named_with_the_nearest():
    with pytest.raises(InputError, match="no card is named 'l40': did you mean 'l40s'"):
        card_of("l40")


def test_own_cards_come_from_a_file_and_replace_those_of_the_same_key(tmp_path):
    file = write(tmp_path / "mine.yaml", mine=OWN, l4=OWN)
    cards = all_cards(file)
    assert card_of("mine", cards).bandwidth_gb_s == 900 and cards["l4"].name == "Mine" and "h100-sxm" in cards


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bandwidth_gb_s": 3.35}, "cards.mine.bandwidth_gb_s: must be greater than or equal to 10, not 3.35"),
        ({"memory_gb": -1}, "cards.mine.memory_gb: must be greater than or equal to 1, not -1"),
        ({"memory_gb": "lots"}, "cards.mine.memory_gb: must be a valid number, not 'lots'"),
        ({"bandwith_gb_s": 900}, "cards.mine.bandwith_gb_s: unknown key; did you mean 'bandwidth_gb_s'?"),
        ({"bf16_tflop_s": 90_000}, "operations a byte, and GPUs have 10 to 2000: check the units"),
        ({"fp8_tflop_s": 1200}, "fp8_tflop_s 1200 is 8 times bf16_tflop_s"),
        ({"reached": "{bandwidth_gb_s: 950, bf16_tflop_s: 140, source: x}"}, "reached.bandwidth_gb_s is 1.06 of"),
        ({"source": None}, "cards.mine.source: missing; it is needed"),
    ],
)
def test_an_impossible_card_is_refused_in_one_line(tmp_path, change, says):
    content = {name: value for name, value in {**OWN, **change}.items() if value is not None}
    with pytest.raises(InputError) as told:
        read_cards(write(tmp_path / "mine.yaml", mine=content))
    assert says in str(told.value) and str(told.value).startswith(str(tmp_path)) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("cards: [", "no valid YAML"), ("- a", "has no keys"), ("cards: {}", "cards"), ("crads: {}", "unknown key")],
)
def test_a_file_that_is_no_list_of_cards_is_refused(tmp_path, text, says):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=says):
        read_cards(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_cards(tmp_path / "none.yaml")


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(FILE.read_text() + "  l4: {}\n")
    with pytest.raises(InputError, match="'l4' is given twice"):
        read_cards(file)


def test_a_draw_of_a_range_has_its_likely_value_as_the_median():
    its = Range(low=1.0, likely=2.0, high=8.0)
    places = draws_of(["x"], np.random.default_rng(0), 101)["x"]
    values = its.at(places)
    assert values.min() > 1 and values.max() < 8 and sorted(values)[50] == pytest.approx(2.0)
    assert (its.at(0.0), its.at(0.5), its.at(1.0)) == pytest.approx((1, 2, 8)) and its.width == 8
    with pytest.raises(InputError, match="is impossible"):
        Range(low=2.0, likely=1.0, high=3.0)
