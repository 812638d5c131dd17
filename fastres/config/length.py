"""The length of a run, in steps or epochs, and the values of the schedule that follow it.

A layer is a source of settings: the recipe with the defaults, a file, or the flags. If a later layer than the one that
set schedule.milestones or schedule.warmup_steps sets the length, these become round(x * steps / old steps).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from fastres.utils.errors import UsageError

if TYPE_CHECKING:
    from fastres.config.schema import Config

FOLLOWING = ("milestones", "warmup_steps")  # fields of the schedule that count steps


@dataclass(frozen=True, kw_only=True)
class Length:
    """The length of a run: `epochs` if it is not None, otherwise `steps`."""

    steps: int
    epochs: float | None = None

    def in_steps(self, samples: int, batch_size: int) -> int:
        """Return the length in steps of `batch_size` samples, for an epoch of `samples`: the nearest, at least 1."""
        if self.epochs is None:
            return self.steps
        return max(1, round(Fraction(self.epochs) * samples / batch_size))


@dataclass(kw_only=True)
class Layers:
    """The length after the layers that were added, and the length for which each value of FOLLOWING was given."""

    length: Length
    given_for: dict[str, Length] = dataclasses.field(default_factory=dict)
    from_a_run: set[str] = dataclasses.field(default_factory=set)  # values that a run's config.yaml holds

    def add(self, name: str, layer: dict[str, Any], default: Length, *, whole: bool) -> None:
        """Add a layer.

        Args:
            name: the layer's name in an error.
            layer: the fields that it sets, as a nested dict of valid values.
            default: the length without any layer.
            whole: True if it sets every field, as config.yaml does, so that the layers before it have no effect.

        Raises:
            UsageError: if it sets both train.steps and train.epochs.
        """
        train, schedule = layer.get("train", {}), layer.get("schedule", {})
        steps, epochs = train.get("steps"), train.get("epochs")
        if steps is not None and epochs is not None:
            raise UsageError(f"{name}train.epochs and train.steps both set the length; leave one of them out")
        if whole:
            self.length = default
        if steps is not None:
            self.length = Length(steps=int(steps))
        elif "epochs" in train:
            self.length = Length(steps=self.length.steps, epochs=None if epochs is None else float(epochs))
        for value in FOLLOWING:
            if value in schedule or whole or value not in self.given_for:
                self.given_for[value] = self.length
                (self.from_a_run.add if whole else self.from_a_run.discard)(value)

    def apply(self, config: Config) -> Config:
        """Return the configuration with this length, and with the lengths for which its schedule was given."""
        used = [name for name in FOLLOWING if name != "milestones" or config.schedule.name == "multistep"]
        return dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, steps=self.length.steps, epochs=self.length.epochs),
            given_for={name: self.given_for[name] for name in used if self.given_for[name] != self.length},
        )


def needs_data(config: Config) -> bool:
    """Return True if the run's steps or its schedule depend on the number of samples."""
    return config.train.epochs is not None or any(given.epochs is not None for given in config.given_for.values())


def in_steps(config: Config, samples: int = 0) -> tuple[Config, list[str]]:
    """Return the configuration with its length in steps and its schedule scaled to it, and lines that say so.

    Args:
        config: the configuration.
        samples: training samples of an epoch, if needs_data(config).
    """
    train, lines = config.train, []
    steps = Length(steps=train.steps, epochs=train.epochs).in_steps(samples, train.batch_size)
    if train.epochs is not None:
        lines.append(f"train.epochs {train.epochs:g}: {steps:,} steps of {train.batch_size} for {samples:,} images")
    scaled: dict[str, Any] = {}
    for name, given in config.given_for.items():
        before, old = getattr(config.schedule, name), given.in_steps(samples, train.batch_size)
        scaled[name] = _scaled(before, steps, old)
        if scaled[name] != before:
            shown = [list(value) if isinstance(value, tuple) else value for value in (before, scaled[name])]
            lines.append(f"schedule.{name}: {shown[0]} -> {shown[1]}, because train.steps is {steps}, not {old}")
    return (
        dataclasses.replace(
            config,
            train=dataclasses.replace(train, steps=steps, epochs=None),
            schedule=dataclasses.replace(config.schedule, **scaled),
            given_for={},
        ),
        lines,
    )


def _scaled(value: Any, steps: int, old: int) -> Any:
    """Return round(value * steps / old), of each item in a tuple; the value itself if `old` is 0."""
    if isinstance(value, Iterable):
        return tuple(_scaled(item, steps, old) for item in value)
    return round(Fraction(value * steps, old)) if old else value
