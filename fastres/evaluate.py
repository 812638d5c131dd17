"""`fastres evaluate RUN`: evaluate a run on the test set and compare the accuracy with its summary.

It prints loss and accuracy, the top-5 accuracy for ten classes or more, and the classes with the lowest accuracies.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

# These packages import their modules, and torch, when one of their names is used: after the command line is parsed.
from fastres import data, runs, training
from fastres.config.schema import Config, DataConfig, EngineConfig
from fastres.utils import ranks
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import Parser, UsageError, run_command, user_path
from fastres.utils.process import command_name

if TYPE_CHECKING:
    from torch import Tensor

    from fastres.data.description import DataDescription

ADJUSTABLE = {"data": DataConfig, "engine": EngineConfig}  # sections that may differ from the run's


def evaluate_run(
    config: Config,
    engine: training.Engine,
    weights: dict[str, Tensor],
    run_data: DataDescription | None = None,
    fold: bool = False,
) -> tuple[training.Evaluation, list[str]]:
    """Return the evaluation of the whole test set, every sample once, and the names of the network's outputs.

    Args:
        config: the run's configuration.
        engine: the resolved engine.
        weights: the state_dict of the run's network.
        run_data: the run's data, whose classes are matched by name; None for a run of an earlier version.
        fold: evaluate a copy of the network whose BatchNorms are folded into the convolutions, on a CPU. It is faster,
            and its figures differ from the run's in rounding.

    Raises:
        UsageError: if the data has classes or channels that the run's network has not.
    """
    model = engine.place(runs.rebuild(config, weights, run_data, engine.norm))
    source = data.load_source(config.data)
    classes, channels = runs.outputs_and_channels(config, weights, run_data)
    if run_data is not None:
        source = data.with_classes_of(source, run_data)
    elif len(source.classes) > classes or source.channels != channels:
        raise UsageError(
            f"data.source: {source.name} has {len(source.classes)} classes and {source.channels} channels, the run's "
            f"network {classes} and {channels}; point --data.root and --data.source at the run's data"
        )
    test = data.build_loader(config, source, source.test, device=engine.device, dtype=engine.dtype)
    if fold:
        model = training.for_inference(model.eval(), engine)
    evaluator = training.Evaluator(model, engine, classes, config.train.eval_mirrored)
    return evaluator(test.evaluate()), runs.output_names(source.classes, classes)


def agreement(totals: training.Metrics, path: Path) -> str:
    """Return a phrase that compares the accuracy of `totals` with the one in the summary at `path`."""
    if not path.exists():
        return f"not compared, because {path} does not exist"
    try:
        accuracy = float(parse_json(path.read_text(encoding="utf-8"))["test_accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: is not a summary of fastres; remove it, and evaluate again") from None
    if totals.accuracy == accuracy:
        return f"equals the accuracy in {path}"
    return (
        f"differs from the accuracy in {path}, {accuracy:.4f} (other weights, data, device, --engine.precision or "
        "--engine.compile than the run's, or --fold)"
    )


def parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser("evaluate", description=__doc__.partition(": ")[2])
    parser.add_argument("run", type=user_path, metavar="RUN", help="Folder of a run.")
    parser.add_argument("--output", type=user_path, metavar="FOLDER", help="Write the accuracy of each class and the "
                        "confusion matrix there: classes.csv, confusion.csv, confusion.png.")  # fmt: skip
    parser.add_argument("--checkpoint", type=user_path, metavar="FILE", help="Use its weights, not the final ones.")
    parser.add_argument("--fold", action="store_true", help="Fold BatchNorm into the convolutions, on a CPU: faster, "
                        "but the figures may differ from the run's by rounding.")  # fmt: skip
    parser.add_trust_code()
    parser.add_quiet()
    group = parser.add_argument_group(f"overrides of the run's settings (see {command_name('train')} --help)")
    for section, fields in ADJUSTABLE.items():
        for field in dataclasses.fields(fields):
            group.add_argument(f"--{section}.{field.name}", metavar="VALUE", default=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Evaluate the run that the command line names."""
    arguments = parser().parse_args(argv)
    if ranks.world_size() > 1:
        raise UsageError(f"{ranks.world_size()} processes would each evaluate everything; run without torchrun")
    # Run eagerly by default, because one pass does not earn back the time to compile.
    flags = {"engine.compile": "false", "engine.cuda_graph": "false"}
    flags |= {k: v for k, v in vars(arguments).items() if "." in k} | {"model.trust_code": arguments.trust_code}
    config, weights = runs.read_run(
        arguments.run, arguments.checkpoint, [f"--{name}={value}" for name, value in flags.items()]
    )
    # Without apex, use another norm, which computes the same.
    if config.model.norm == "apex" and training.find_apex(training.APEX_NORM)[0] is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, norm="auto"))
    engine = training.resolve_engine(config)
    engine.apply_torch_settings()
    totals, names = evaluate_run(config, engine, weights, runs.load_description(arguments.run), arguments.fold)
    if arguments.output is not None:
        try:
            arguments.output.mkdir(parents=True, exist_ok=True)
            runs.write_classes(totals, names, arguments.output, config.model.name)
        except OSError as error:
            raise UsageError(
                f"--output {arguments.output}: cannot be written ({error.strerror}); choose another folder"
            ) from None
    print(
        f"{arguments.checkpoint or arguments.run}: test accuracy {totals.accuracy:.4f}, loss {totals.mean_loss:.4f}, "
        f"{totals.samples:,} images, on {runs.device_name(engine.device)} in {engine.precision}; "
        + agreement(totals, arguments.run / "summary.json")
    )
    for line in () if arguments.quiet else runs.accuracy_lines(totals, names):
        print(line)


if __name__ == "__main__":
    run_command(main)
