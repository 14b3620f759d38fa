"""GPUs by their data sheets: read from cards.yaml of this package and from files of the user, strictly."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.cards.ranges import Range
from harness.errors import InputError
from harness.yaml_text import UniqueKeys

FILE = Path(__file__).with_name("cards.yaml")
BANDWIDTH, THROUGHPUT = "bandwidth reached", "matrix throughput reached"  # unknowns: shares of the data sheet
_MEASURED = 1.02  # a measured share is known to this factor: other cards of the kind, clocks, temperature
# What copies and products reach of a data sheet where nobody measured the card. Both cards that were measured reach
# 0.90 of their bandwidth, and 0.80 and 0.81 of their throughput; cards below 400 W throttle in matrix products.
SHARES = {
    BANDWIDTH: Range(low=0.78, likely=0.89, high=0.95, source="H100 0.90, H200 0.90; wider for other memory"),
    THROUGHPUT: Range(low=0.5, likely=0.75, high=0.92, source="H100 0.81, H200 0.80; wider for lower power limits"),
}


_Gigabytes = Annotated[float, Field(strict=True, ge=1, le=2_000)]
_GigabytesPerSecond = Annotated[float, Field(strict=True, ge=10, le=100_000)]
_TeraPerSecond = Annotated[float, Field(strict=True, ge=1, le=100_000)]
_Watts = Annotated[float, Field(strict=True, ge=5, le=10_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reached(_Strict):
    """What a card was measured to reach, GB/s and TFLOP/s; ``source``: how."""

    bandwidth_gb_s: _GigabytesPerSecond
    bf16_tflop_s: _TeraPerSecond
    source: str = Field(min_length=1)


class Card(_Strict):
    """One GPU. Throughput is dense, in TFLOP/s (int8: TOP/s); None where the card lacks the type or nobody says."""

    key: str = ""
    name: str = Field(min_length=1)
    aliases: tuple[str, ...] = ()
    memory_gb: _Gigabytes
    bandwidth_gb_s: _GigabytesPerSecond
    bf16_tflop_s: _TeraPerSecond
    fp8_tflop_s: _TeraPerSecond | None = None
    int8_top_s: _TeraPerSecond | None = None
    power_w: _Watts
    source: str = Field(min_length=1)
    reached: Reached | None = None

    @model_validator(mode="after")
    def _possible(self) -> Card:
        ratio = self.bf16_tflop_s / self.bandwidth_gb_s * 1e3
        low, high = 10, 2_000
        if not low <= ratio <= high:
            raise ValueError(
                f"bf16_tflop_s {self.bf16_tflop_s:g} at bandwidth_gb_s {self.bandwidth_gb_s:g} is {ratio:.3g} "
                f"operations a byte, and GPUs have {low} to {high}: check the units (GB/s, TFLOP/s)"
            )
        for name in ("fp8_tflop_s", "int8_top_s"):
            value = getattr(self, name)
            if value is not None and not 0.9 <= value / self.bf16_tflop_s <= 4.4:
                raise ValueError(
                    f"{name} {value:g} is {value / self.bf16_tflop_s:.2g} times bf16_tflop_s, and GPUs have 1 to 4 "
                    "times: give both without sparsity"
                )
        if self.reached:
            self._reached_is_possible(self.reached)
        return self

    def _reached_is_possible(self, reached: Reached) -> None:
        for name in ("bandwidth_gb_s", "bf16_tflop_s"):
            share = getattr(reached, name) / getattr(self, name)
            if not 0.2 <= share <= 1.02:
                raise ValueError(f"reached.{name} is {share:.2f} of {name}: a card reaches 0.2 to 1 of its data sheet")

    @property
    def memory_bytes(self) -> int:
        """Bytes, by decimal gigabytes: drivers report at least as much."""
        return round(self.memory_gb * 1e9)

    @property
    def shares(self) -> dict[str, Range]:
        """By unknown, the share of the data sheet that copies and matrix products reach."""
        if self.reached is None:
            return dict(SHARES)
        known = {
            BANDWIDTH: self.reached.bandwidth_gb_s / self.bandwidth_gb_s,
            THROUGHPUT: self.reached.bf16_tflop_s / self.bf16_tflop_s,
        }
        return {name: Range.around(share, _MEASURED, self.reached.source) for name, share in known.items()}


class _Cards(_Strict):
    cards: dict[str, Card] = Field(min_length=1)


def read_cards(path: Path | str) -> dict[str, Card]:
    """The cards of a YAML file by their keys. Raises InputError with a line per mistake: file, card, key, and why."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give another --cards") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} has no keys: start with 'cards:' and one card below it")
    try:
        cards = _Cards.model_validate(content).cards
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {_problem(each)}" for each in error.errors())) from None
    return {key: card.model_copy(update={"key": key}) for key, card in cards.items()}


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        known = [*Card.model_fields, *Reached.model_fields] if len(error["loc"]) > 1 else ["cards"]
        return f"{where}: unknown key; {_hint(key, known)}"
    if error["type"] == "missing":
        return f"{where}: missing; it is needed"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{where}: {message}" if error["type"] == "value_error" else f"{where}: {message}, not {error['input']!r}"


@cache
def own_cards() -> dict[str, Card]:
    """The cards that come with the harness."""
    return read_cards(FILE)


def all_cards(file: Path | str | None = None) -> dict[str, Card]:
    """The cards of the harness, and those of ``file``, which replace cards of the same key."""
    return {**own_cards(), **(read_cards(file) if file else {})}


def card_of(name: str, cards: dict[str, Card] | None = None) -> Card:
    """A card by its key, name or alias, in any case. Raises InputError with the nearest ones."""
    cards = own_cards() if cards is None else cards
    wanted = _folded(name)
    for card in cards.values():
        if wanted in map(_folded, (card.key, card.name, *card.aliases)):
            return card
    raise InputError(f"no card is named {name!r}: {_hint(name.lower(), cards)}; or describe it in a file (--cards)")


def _folded(name: str) -> str:
    return "-".join(name.lower().replace("_", "-").split())


def _hint(word: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
