"""Options that give a number for each type of device, such as ``--price h100=2.5,l40s=1``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError

if TYPE_CHECKING:
    from harness.cards.card import Card


def numbers_by_type(option: str, text: str) -> dict[str, float]:
    """``h100=2.5,l40s=1`` as numbers by type. Raises InputError naming the option."""
    found = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, number = part.rpartition("=")
        try:
            if not equals or not name.strip() or not 0 < float(number) < 1e9:
                raise ValueError
        except ValueError:
            raise InputError(f"{option} {part!r}: give TYPE=NUMBER with a number above 0, such as h100=2.5") from None
        if any(same(name, each) for each in found):
            raise InputError(f"{option} gives {name.strip()} twice: leave one out")
        found[name.strip()] = float(number)
    return found


def names_of(name: str, file: Path | None) -> list[str]:
    """What a type may be called: a card by its key, aliases and name. ``file``: of further cards."""
    from harness.cards.card import all_cards, card_of

    try:
        card = card_of(name, all_cards(file))
    except InputError:
        return [name]
    return [card.key, *card.aliases, card.name]


def same(one: str, other: str) -> bool:
    return one.strip().lower() == other.strip().lower()


def number_of(option: str, numbers: dict[str, float], name: str, file: Path | None) -> float | None:
    """What an option gives for a type, by any of its names. Raises InputError where two names give two numbers."""
    names = names_of(name, file)
    given = [key for key in numbers if any(same(key, each) for each in names)]
    if len(given) > 1:
        raise InputError(f"{option} gives {given[0]} and {given[1]}, which are one type: leave one out")
    return numbers[given[0]] if given else None


def prices_of(text: str, cards: Sequence[Card], file: Path | None) -> dict[str, float]:
    """``--price`` by the keys of cards. Raises InputError for a type that is none of them."""
    given, found = numbers_by_type("--price", text), {}
    for card in cards:
        price = number_of("--price", given, card.key, file)
        if price is not None:
            found[card.key] = price
    known = {name for card in cards for name in names_of(card.key, file)}
    if unknown := [name for name in given if not any(same(name, each) for each in known)]:
        chosen = ", ".join(card.key for card in cards)
        raise InputError(f"--price {unknown[0]}: that is none of the cards {chosen}: leave it out, or add it to --card")
    return found
