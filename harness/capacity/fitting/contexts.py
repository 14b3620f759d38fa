"""What a frame step costs by the frames that its sessions have spoken, and rungs as a steady state would find them.

Attention reads the whole context of a session, so a step with n sessions takes a + b n + c K seconds, K being the sum
of their contexts in frames. A ladder of long sessions finds them at the contexts that they happen to have; in steady
state their mean is that of sessions found in progress.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import optimize, special

from harness import wire
from harness.capacity.fitting.observations import seconds
from harness.capacity.models.steps import WORST_RESIDUAL_OF_A_LINE, Rungs, align
from harness.records.schema import Rung

MOST_P_VALUE = 0.01  # of the improvement by a context term; above it, none is fitted
_PASSES = 4


@dataclass(frozen=True)
class ContextCost:
    """``frame_s``: seconds of a step per frame of context of all its sessions, with its standard error."""

    frame_s: float
    error_s: float
    degrees: int


def context_of(rungs: list[Rung], requests: pd.DataFrame) -> np.ndarray:
    """Frames [rungs] that the sessions in progress have spoken, summed over them: means over each window.

    ``requests``: of the rungs' trial, as for ``observe``. A session speaks evenly from its first to its last chunk.
    """
    sent_s, ended_s = seconds(requests["sent_ns"]), seconds(requests["ended_ns"])
    first_s, last_s = seconds(requests["first_received_ns"]), seconds(requests["last_received_ns"])
    before = requests["start_frame"].to_numpy(float)
    spoken = requests["audio_s"].fillna(0).to_numpy(float) / wire.SECONDS_PER_FRAME
    found = []
    for rung in rungs:
        start_s, end_s = np.maximum(sent_s, rung.start_ns / 1e9), np.minimum(ended_s, rung.end_ns / 1e9)
        inside_s = np.maximum(end_s - start_s, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.clip(((start_s + end_s) / 2 - first_s) / (last_s - first_s), 0, 1)
        frames = before + spoken * np.nan_to_num(share)
        found.append(float(frames @ inside_s) / ((rung.end_ns - rung.start_ns) / 1e9))
    return np.array(found)


def context_cost(rungs: Rungs, context: np.ndarray) -> ContextCost | None:
    """Least squares of relative errors with all coefficients at or above zero; None where no context shows.

    ``context`` [rungs]. A term is fitted where it improves the line by more than chance (F test), and the line with it
    is off by no more than 10% anywhere.
    """
    if len(context) < 6 or np.ptp(context / rungs.sessions) < 1:
        return None
    columns = np.column_stack([np.ones(len(context)), rungs.sessions, context])
    level, cost = rungs, np.zeros(3)
    for _ in range(_PASSES):
        cost, _ = optimize.nnls(columns / level.step_s[:, None], np.ones(len(context)))
        beside = replace(rungs, step_s=np.maximum(rungs.step_s - cost[2] * context, 0.05 * rungs.step_s))
        factors = align(beside)[1][np.unique(rungs.trial, return_inverse=True)[1]]
        level = replace(rungs, step_s=rungs.step_s / factors)
    rows = columns / level.step_s[:, None]
    cost, off = optimize.nnls(rows, np.ones(len(context)))
    _, off_without = optimize.nnls(rows[:, :2], np.ones(len(context)))
    degrees = len(context) - 3 - (len(np.unique(rungs.trial)) - 1)
    if degrees < 2 or cost[2] <= 0 or np.max(np.abs(rows @ cost - 1)) > WORST_RESIDUAL_OF_A_LINE:
        return None
    f_value = max(off_without**2 - off**2, 0.0) / max(off**2 / degrees, 1e-18)  # 0: without rounding below it
    if special.fdtrc(1, degrees, f_value) > MOST_P_VALUE:
        return None
    error_s = math.sqrt(off**2 / degrees * float(np.linalg.pinv(rows.T @ rows)[2, 2]))
    return ContextCost(float(cost[2]), error_s, degrees)


def in_steady_state(rungs: Rungs, context: np.ndarray, steady: float, cost: ContextCost) -> Rungs:
    """The rungs at the contexts of steady state: ``steady`` frames per session."""
    step_s = rungs.step_s + cost.frame_s * (steady * rungs.sessions - context)
    return replace(rungs, step_s=np.maximum(step_s, 0.05 * rungs.step_s))
