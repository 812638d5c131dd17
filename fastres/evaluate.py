"""`python -m fastres.evaluate RUN`: the test set once through a run's weights, and whether its summary agrees."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fastres.config.cli import parse
from fastres.config.schema import Config, DataConfig, EngineConfig, model_options
from fastres.data.loaders.build import build_loader
from fastres.data.sources.source import load_source
from fastres.models.registry import build_model
from fastres.runs import checkpoint
from fastres.runs.environment import device_name
from fastres.training.engine import APEX_NORM, Engine, find_apex, resolve
from fastres.training.step import Evaluator, Metrics
from fastres.utils import ranks
from fastres.utils.errors import Parser, UsageError, run_command

ADJUSTABLE = {"data": DataConfig, "engine": EngineConfig}  # what may differ from the run: where and how


def load_run(
    folder: Path, file: Path | None = None, flags: Sequence[str] = ()
) -> tuple[Config, dict[str, Tensor]]:
    """A run's configuration with `flags` over it, and its weights: the final ones, or those of a checkpoint."""
    written = folder / "config.yaml"
    if not written.is_file():
        raise UsageError(
            f"{folder} is not the folder of a run, it holds no config.yaml: give one that fastres.train has written"
        )
    # Trackers off: what they need is not needed to read the run.
    config = parse([f"--config={written}", "--run.tensorboard=false", "--run.wandb=false", *flags])
    if file is not None:
        try:
            return config, _checked(checkpoint.load(file)["trainer"]["model"])
        except (KeyError, TypeError) as error:
            raise UsageError(f"{file} is not a checkpoint of fastres ({error})") from None
    final = folder / "model.safetensors"
    if not final.is_file():
        newest = next(iter(checkpoint.found(folder / "checkpoints")), "FILE")
        raise UsageError(
            f"{folder} is a run that is not finished, it holds no model.safetensors: finish it with fastres.train, "
            f"or give --checkpoint {newest}"
        )
    try:
        return config, _checked(safetensors.torch.load_file(final))
    except Exception as error:  # whatever a damaged file provokes
        raise UsageError(f"{final} cannot be read ({error}): give --checkpoint FILE") from None


def _checked(weights: Any) -> dict[str, Tensor]:
    """Weights with the two tensors whose shapes say what the network is. KeyError, TypeError where they are not."""
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise TypeError("its weights are not all tensors")
    if weights["conv1.weight"].ndim != 4 or weights["fc.weight"].ndim != 2:
        raise TypeError("a tensor is of another shape")
    return weights


def rebuild(config: Config, weights: dict[str, Tensor], norm: str = "torch") -> nn.Module:
    """The run's network holding `weights`, whose shapes tell how many channels and classes it has."""
    options = model_options(config.model)
    if norm != "fused":
        options.pop("fused_convolutions", None)  # the same network, computed in another way
    try:
        model = build_model(
            config.model.name,
            num_classes=weights["fc.weight"].shape[0],
            in_channels=weights["conv1.weight"].shape[1],
            norm=norm,
            **options,
        )
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"the weights are not those of the run's {config.model.name} ({reason}): give files of one run"
        ) from None
    return model


def evaluate_run(config: Config, engine: Engine, weights: dict[str, Tensor]) -> Metrics:
    """Loss and right answers over the whole test set, every sample once."""
    model = engine.place(rebuild(config, weights, engine.norm))
    source = load_source(config.data)
    classes, channels = weights["fc.weight"].shape[0], weights["conv1.weight"].shape[1]
    if len(source.classes) > classes or source.channels != channels:
        raise UsageError(
            f"{source.name} has {len(source.classes)} classes and {source.channels} channels, the run's network "
            f"{classes} and {channels}: point --data.root and --data.source at the run's data"
        )
    test = build_loader(config, source, source.test, device=engine.device, dtype=engine.dtype)
    return Evaluator(model, engine, config.train.eval_mirrored)(test.evaluate())


def agreement(totals: Metrics, path: Path) -> str:
    """Whether the summary at `path` has the accuracy of `totals`, in words."""
    if not path.exists():
        return f"there is no {path} to compare with"
    try:
        accuracy = float(json.loads(path.read_text(encoding="utf-8"))["test_accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not a summary of fastres: remove it, and evaluate again") from None
    if totals.accuracy == accuracy:
        return f"equals the accuracy in {path}"
    return (
        f"differs from the accuracy in {path}, {accuracy:.4f} (other weights, data, device, --engine.precision or "
        "--engine.compile than the run's)"
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="fastres.evaluate", description=__doc__.partition(": ")[2])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="take its weights, not the final ones"
    )
    group = parser.add_argument_group("in place of the run's own (fastres.train --help describes them)")
    for section, fields in ADJUSTABLE.items():
        for field in dataclasses.fields(fields):
            group.add_argument(f"--{section}.{field.name}", metavar="VALUE", default=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if ranks.world_size() > 1:
        raise UsageError(f"{ranks.world_size()} processes would each do all of it: without torchrun")
    # Eager unless asked otherwise: one pass does not earn back what compiling takes.
    flags = {"engine.compile": "false", "engine.cuda_graph": "false"}
    flags |= {k: v for k, v in vars(arguments).items() if "." in k}
    config, weights = load_run(
        arguments.run, arguments.checkpoint, [f"--{name}={value}" for name, value in flags.items()]
    )
    # A network trained with apex's norm is the same without.
    if config.model.norm == "apex" and find_apex(APEX_NORM)[0] is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, norm="auto"))
    engine = resolve(config)
    totals = evaluate_run(config, engine, weights)
    print(
        f"{arguments.checkpoint or arguments.run}: test accuracy {totals.accuracy:.4f}, loss {totals.mean_loss:.4f}, "
        f"{totals.samples:,} images, on {device_name(engine.device)} in {engine.precision}; "
        + agreement(totals, arguments.run / "summary.json")
    )


if __name__ == "__main__":
    run_command(main)
