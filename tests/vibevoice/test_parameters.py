"""Numbers in a config.pbtxt that the processes behind it cannot work with."""

import math

import pytest

from harness.errors import InputError
from harness.vibevoice.process.parameters import number


@pytest.mark.parametrize(("text", "kind", "value"), [("0", int, 0), ("64", int, 64), ("0.5", float, 0.5)])
def test_a_number_is_taken_as_its_kind(text, kind, value):
    assert number({"x": text}, "x", 0, kind) == value and type(number({"x": text}, "x", 0, kind)) is kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [("-1", int), ("0.5", int), ("lots", int), ("", int), ("-0.1", float), (str(math.nan), float), ("inf", float)],
)
def test_what_would_hang_or_flood_every_request_is_refused_by_its_name(text, kind):
    with pytest.raises(InputError, match=f"the parameter x is {text!r}: it must be a .*number of at least 0"):
        number({"x": text}, "x", 0, kind)
