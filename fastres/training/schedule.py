"""The learning rate as a pure function of the step, so that resumed, replayed and distributed runs are equal."""

from __future__ import annotations

import math
from collections.abc import Callable

from fastres.config.schema import ScheduleConfig


def multistep(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return factor to the power of the milestones passed (He et al. 2015, section 4.2)."""
    scale: float = config.factor ** sum(step >= milestone for milestone in config.milestones)
    return scale


def cosine(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return a cosine from 1 at the end of the warm-up to final_scale at the last step (Loshchilov and Hutter 2016)."""
    final: float = config.final_scale
    return final + (1 - final) * (1 + math.cos(math.pi * _done(config, step, steps))) / 2


def triangular(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return a line from 1 at the end of the warm-up to final_scale at the last step (Smith 2017)."""
    final: float = config.final_scale
    return 1 + (final - 1) * _done(config, step, steps)


def constant(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return 1 throughout."""
    return 1.0


SCHEDULES: dict[str, Callable[[ScheduleConfig, int, int], float]] = {
    "multistep": multistep,
    "cosine": cosine,
    "triangular": triangular,
    "constant": constant,
}


def lr_scale(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the fraction of optim.lr for step `step` of `steps` (counted from 0), warm-up included."""
    if step < config.warmup_steps:
        first: float = config.warmup_scale
        if config.warmup == "constant":
            return first
        scale: float = first + (1 - first) * step / config.warmup_steps
        return scale
    return SCHEDULES[config.name](config, step, steps)


def _done(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the fraction of the way from the end of the warm-up to the last step."""
    done: float = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return done
