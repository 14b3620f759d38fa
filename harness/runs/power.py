"""The power of a run's GPUs: as sampled beside its trials, otherwise as a data sheet limits it."""

from __future__ import annotations

from harness.cards.card import all_cards, card_of
from harness.errors import InputError
from harness.records.schema import RunManifest, Trial
from harness.records.store import Run
from harness.runs.stages import stages_by_server
from harness.topology import Knobs

MEASURED, ESTIMATED = "measured", "estimated"


def watts_of(run: Run, gpus: int, deployment: Knobs) -> tuple[float | None, str]:
    """Watts of all GPUs of a device under load, and their basis; (None, "") where nothing says.

    Measured: the highest mean of a VALID trial of ``deployment``, by the gauges sampled during it, of those GPUs that
    the stages of its server reported to run on: other GPUs of the host may serve anybody. Estimated: the limit of the
    card, as for an emulated one, whose host's gauges say nothing of it.
    """
    trials = [each for each in run.trials() if each.valid and each.deployment == deployment]
    means = [_mean_watts(run, each) for each in trials] if not run.manifest.emulated else []
    if known := [mean for mean in means if mean is not None]:
        return max(known), MEASURED
    return watts_of_card(run.manifest.device.removeprefix("emulated "), gpus)


def watts_of_card(device: str, gpus: int = 1) -> tuple[float | None, str]:
    """Watts of GPUs by the limit on the data sheet of the card of that name, and their basis; (None, "") for others."""
    try:
        card = card_of(device.removesuffix(" (estimated)"), all_cards())
    except InputError:
        return None, ""
    return card.power_w * gpus, ESTIMATED


def _mean_watts(run: Run, trial: Trial) -> float | None:
    """The mean over a trial's samples of the sum over its server's GPUs; None where a gauge, or a GPU, is not known."""
    own, sums = _gpus_of(run.manifest, trial), []
    for sample in run.samples(trial.trial_id):
        watts = [gpu.power_w for gpu in sample.gpus if gpu.uuid in own]
        known = [each for each in watts if each is not None]
        if not own or len(known) < len(own):
            return None
        sums.append(sum(known))
    return sum(sums) / len(sums) if sums else None


def _gpus_of(manifest: RunManifest, trial: Trial) -> set[str]:
    """The UUIDs of the GPUs that the stages of a trial's server reported."""
    servers = stages_by_server(manifest, trial.topology)
    stages = servers.get(trial.target) or next(iter(servers.values()), ())
    return {each.gpu_uuid for each in stages if each.gpu_uuid}
