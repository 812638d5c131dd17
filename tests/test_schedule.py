"""The learning rate as a table: lr_scale(config, step, steps) is a share of optim.lr."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastres.config.cli import parse
from fastres.config.schema import Config, ScheduleConfig
from fastres.training.schedule import SCHEDULES, lr_scale


@cache
def recipe(name: str) -> Config:
    return parse(["--recipe", name])


def test_every_schedule_of_the_config_exists() -> None:
    assert set(SCHEDULES) == set(get_args(get_type_hints(ScheduleConfig)["name"]))


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.1),  # the first step
        (31_999, 0.1),  # the last one before the first milestone
        (32_000, 0.01),  # from the milestone itself on
        (47_999, 0.01),
        (48_000, 0.001),
        (63_999, 0.001),  # the last step
    ],
)
def test_the_64k_step_schedule_of_he_et_al(step: int, lr: float) -> None:
    config = recipe("cifar10-resnet20")
    assert config.optim.lr * lr_scale(config.schedule, step, config.train.steps) == pytest.approx(lr)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.01),  # "we use 0.01 to warm up the training"
        (399, 0.01),  # "about 400 iterations"
        (400, 0.1),  # "then go back to 0.1"
        (31_999, 0.1),
        (32_000, 0.01),  # the milestones count from step 0, not from the end of the warm-up
        (48_000, 0.001),
    ],
)
def test_resnet_110_warms_up(step: int, lr: float) -> None:
    config = recipe("cifar10-resnet110")
    assert config.optim.lr * lr_scale(config.schedule, step, config.train.steps) == pytest.approx(lr)


TABLES: dict[str, tuple[dict[str, Any], int, dict[int, float]]] = {
    "linear warm-up from 0": (
        {"name": "constant", "warmup_steps": 4},
        10,
        {
            0: 0.0,  # warmup_scale
            1: 0.25,
            3: 0.75,
            4: 1.0,  # the first step after it
            9: 1.0,
        },
    ),
    "linear warm-up from 0.2 into multistep": (
        {"warmup_steps": 4, "warmup_scale": 0.2, "milestones": (6,), "factor": 0.5},
        10,
        {0: 0.2, 2: 0.6, 4: 1.0, 5: 1.0, 6: 0.5, 9: 0.5},
    ),
    "constant, without any warm-up": ({"name": "constant"}, 10, {0: 1.0, 9: 1.0}),
    "cosine": (
        {"name": "cosine"},
        11,
        {
            0: 1.0,  # starts at the peak
            5: 0.5,  # half-way in steps is half-way in height
            10: 0.0,  # the last step ends it
        },
    ),
    "cosine after a warm-up, down to a share": (
        {"name": "cosine", "warmup_steps": 10, "final_scale": 0.1},
        21,
        {
            0: 0.0,
            9: 0.9,  # still rising
            10: 1.0,  # the peak
            15: 0.55,  # between 1 and 0.1
            20: 0.1,  # final_scale
        },
    ),
    "triangular": (
        {"name": "triangular", "warmup_steps": 2},
        7,
        {
            0: 0.0,
            1: 0.5,
            2: 1.0,  # the peak is at warmup_steps
            3: 0.75,
            4: 0.5,
            6: 0.0,  # the last step
        },
    ),
    "triangular down to a share": (
        {"name": "triangular", "warmup_steps": 2, "warmup_scale": 0.2, "final_scale": 0.5},
        7,
        {0: 0.2, 1: 0.6, 2: 1.0, 4: 0.75, 6: 0.5},
    ),
    "a run that is all warm-up": ({"name": "cosine", "warmup_steps": 4}, 4, {0: 0.0, 3: 0.75}),
    "a run of one step": ({"name": "triangular"}, 1, {0: 1.0}),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_rate_follows_the_table(name: str) -> None:
    fields, steps, table = TABLES[name]
    config = ScheduleConfig(**fields)
    assert {step: lr_scale(config, step, steps) for step in table} == pytest.approx(table, abs=1e-12)


def test_cosine_falls_as_a_cosine_does() -> None:
    config = ScheduleConfig(name="cosine")
    scales = [lr_scale(config, step, 101) for step in range(101)]
    assert scales == pytest.approx([(1 + math.cos(math.pi * step / 100)) / 2 for step in range(101)])
    assert scales == sorted(scales, reverse=True)


@st.composite
def runs(draw: st.DrawFn) -> tuple[ScheduleConfig, int]:
    steps = draw(st.integers(1, 100_000))
    share = st.floats(0, 1)
    config = ScheduleConfig(
        name=draw(st.sampled_from(sorted(SCHEDULES))),
        milestones=tuple(sorted(draw(st.sets(st.integers(1, 100_000), max_size=4)))),
        factor=draw(st.floats(0.01, 1)),
        warmup=draw(st.sampled_from(["linear", "constant"])),
        warmup_steps=draw(st.integers(0, steps)),
        warmup_scale=draw(share),
        final_scale=draw(share),
    )
    return config, steps


@settings(max_examples=100, deadline=None)
@given(run=runs(), data=st.data())
def test_the_rate_depends_on_the_step_alone_and_is_between_0_and_1(
    run: tuple[ScheduleConfig, int], data: st.DataObject
) -> None:
    config, steps = run
    order = data.draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=10))
    scales = {step: lr_scale(config, step, steps) for step in order}
    assert all(-1e-12 <= scale <= 1 + 1e-12 for scale in scales.values())
    fresh = dataclasses.replace(config)
    assert all(lr_scale(fresh, step, steps) == scales[step] for step in reversed(order))
