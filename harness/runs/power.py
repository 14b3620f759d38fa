"""The power of a run's GPUs: as sampled beside its trials, otherwise as a data sheet limits it."""

from __future__ import annotations

from harness.cards.card import all_cards, card_of
from harness.errors import InputError
from harness.records.store import Run

MEASURED, ESTIMATED = "measured", "estimated"


def watts_of(run: Run, gpus: int) -> tuple[float | None, str]:
    """Watts of all GPUs of a device under load, and their basis; (None, "") where nothing says.

    Measured: the highest mean of a trial, by the gauges sampled during it. Estimated: the limit of the card.
    """
    means = [mean for trial in run.trials() if (mean := _mean_watts(run, trial.trial_id)) is not None]
    if means:
        return max(means), MEASURED
    try:
        card = card_of(run.manifest.device.removeprefix("emulated "), all_cards())
    except InputError:
        return None, ""
    return card.power_w * gpus, ESTIMATED


def _mean_watts(run: Run, trial_id: str) -> float | None:
    """The mean over a trial's samples of the sum over its GPUs; None where a gauge is missing."""
    sums = []
    for sample in run.samples(trial_id):
        watts = [gpu.power_w for gpu in sample.gpus]
        known = [each for each in watts if each is not None]
        if not watts or len(known) < len(watts):
            return None
        sums.append(sum(known))
    return sum(sums) / len(sums) if sums else None
