"""`fastres profile`: measure variants of a block or a network side by side, or what limits a run (--limits).

profiling/ has the parts: variants.py (workloads and variants), measure.py (timing), trace.py (reading traces) and
report.py (files and tables); limits.py and verdict.py for --limits.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastres.config.formats import read_yaml
from fastres.config.validation import check_device
from fastres.models.registry import check_foreign, find, is_foreign
from fastres.profiling.variants import AXES, DEFAULTS, variants_named
from fastres.utils import ranks
from fastres.utils.atomic_io import write_json
from fastres.utils.errors import Parser, UsageError, positive, run_command, user_path
from fastres.utils.process import command_name

if TYPE_CHECKING:
    from fastres.profiling.workloads import Workload

LIMITS = "--limits"
BLOCKS = ("basic", "bottleneck")  # as in models.imagenet.BLOCKS


def option(text: str) -> tuple[str, Any]:
    """Return the name and the YAML value of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as stem=small")
    try:
        return name, read_yaml(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: the value cannot be read as YAML: {error}") from None


def parser() -> Parser:
    """Return the command line's parser."""
    on_a_gpu = [variant for variant in DEFAULTS["cuda"] if variant not in DEFAULTS["cpu"]]
    made = Parser(
        "profile",
        renamed={"--out": "--output"},
        description="Measure variants of one block or of a whole network side by side, or what limits a run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  %(prog)s --model resnet50 --batch-size 256\n"
        "  %(prog)s --block basic --channels 16 --size 32 --batch-size 1024\n"
        "  %(prog)s --variants eager-fp32 'compile-*channels_last-bf16'\n"
        "  %(prog)s --limits --recipe imagenet-resnet50 --data.root data\n"
        "\nExit status: 0 done, 1 failed, 2 invalid input.",
    )
    made.add_argument(LIMITS, action="store_true",
                      help="Measure whether its loader, launches, memory bandwidth or compute limits a run. All other "
                      f"flags are then those of {command_name('train')}, and nothing is written.")  # fmt: skip
    what = made.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="NAME", help="A network by its name. (default: resnet20)")
    what.add_argument("--block", choices=BLOCKS, help="One residual block of stride 1, as inside a network.")
    made.add_argument("--options", type=option, nargs="+", default=[], metavar="NAME=VALUE",
                      help="Options of the network, such as stem=small num_classes=100.")  # fmt: skip
    made.add_argument("--channels", type=positive, metavar="C",
                      help="Channels of the block's input and output. (default: 64)")  # fmt: skip
    made.add_argument("--size", type=positive, metavar="S",
                      help="Side of an image. (default: that of the network's data, or 32 for a block)")  # fmt: skip
    made.add_argument("--batch-size", type=positive, default=128, metavar="N",
                      help="Images of a step. (default: %(default)s)")  # fmt: skip
    made.add_argument(
        "--variants", nargs="+", metavar="VARIANT",
        help="MODE-NORM-LAYOUT-PRECISION (NAME+fuse is NAME-fused) of "
        + " × ".join(f"{{{', '.join(words)}}}" for words in AXES.values())
        + ". An omitted word is the first of its set. A name with * stands for all that match. The first variant is "
        "the baseline. (default: "
        + ", ".join(DEFAULTS["cpu"]) + "; on a GPU also " + ", ".join(on_a_gpu) + ")",
    )  # fmt: skip
    made.add_argument("--device", "--engine.device", dest="device", default="auto",
                      help="Device to measure on: auto, cpu, cuda or cuda:N. (default: %(default)s)")  # fmt: skip
    made.add_trust_code()
    made.add_argument("--rounds", type=positive, default=10, metavar="N", help="Rounds of each. (default: %(default)s)")
    made.add_argument("--steps", type=positive, metavar="N",
                      help="Steps of a round. (default: as many as take the baseline half a second)")  # fmt: skip
    made.add_argument("--output", type=user_path, metavar="FOLDER",
                      help="Folder to write. (default: profiles/NAME, or NAME-2 ...)")  # fmt: skip
    made.add_argument("--trace", action=argparse.BooleanOptionalAction, default=True,
                      help="Keep the traces, for ui.perfetto.dev. (default: --trace)")  # fmt: skip
    return made


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise UsageError for a wrong device, variant or network, or a flag of the other kind of workload."""
    check_device(arguments.device)
    variants_named(arguments.variants or ())
    if arguments.block is not None and arguments.options:
        raise UsageError("--options belongs to --model; for a block use --channels and --size")
    if arguments.block is None and arguments.channels is not None:
        raise UsageError("--channels belongs to --block; for a network use --options in_channels=C")
    try:
        name = arguments.model or "resnet20"
        if is_foreign(name):
            check_foreign(name, arguments.trust_code == "true")
        else:
            find(name)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from None


def workload_of(arguments: argparse.Namespace) -> Workload:
    """Return the requested network or block."""
    from fastres.profiling.workloads import block_workload, model_workload

    if arguments.block is None:
        name = arguments.model or "resnet20"
        trusted = arguments.trust_code == "true"
        return model_workload(name, dict(arguments.options), arguments.batch_size, arguments.size, trusted)
    return block_workload(arguments.block, arguments.channels or 64, arguments.batch_size, arguments.size or 32)


def folder_for(output: Path | None, name: str) -> Path:
    """Create and return the folder to write.

    Without --output, the folder is profiles/NAME, or NAME-2 and so on if it holds a profile already.

    Raises:
        UsageError: if --output holds a profile already, or the folder cannot be written.
    """
    folder = output or Path("profiles") / name
    count = 1
    while (folder / "profile.json").exists():
        if output is not None:
            raise UsageError(f"--output {output}: holds a profile already; choose another or remove it")
        count += 1
        folder = Path("profiles") / f"{name}-{count}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written ({error.strerror}); choose another") from None


def limits(flags: list[str]) -> None:
    """Print what limits the run that train's flags describe."""
    from fastres.config.cli import parse

    if ranks.world_size() > 1:
        raise UsageError(f"{LIMITS}: measures one process; start it without torchrun")
    config = parse(flags, f"{command_name('profile')} {LIMITS}")

    from fastres.profiling.limits import measure_limits, show
    from fastres.training.engine import resolve_engine

    engine = resolve_engine(config)
    engine.apply_torch_settings()
    show(measure_limits(config, engine, say=print), terminal())


def terminal() -> Console:
    """Return a console on stdout that is wide enough for the tables if stdout is a file."""
    return Console(width=None if sys.stdout.isatty() else 140)


def main(argv: list[str] | None = None) -> None:
    """Profile the requested workload, and write profile.json, profile.csv and profile.png."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise Kineto logs each of its stages
    flags = sys.argv[1:] if argv is None else argv
    if LIMITS in flags:
        limits([flag for flag in flags if flag != LIMITS])
        return
    arguments = parser().parse_args(flags)
    check_flags(arguments)
    workload = workload_of(arguments)

    import torch  # after the command line is checked, because torch takes a second or two

    from fastres.profiling.measure import measure
    from fastres.profiling.report import plot, raw, rows_of, show, write_csv
    from fastres.profiling.workloads import resolved

    on_gpu = arguments.device.startswith("cuda") or (arguments.device == "auto" and torch.cuda.is_available())
    asked = variants_named(arguments.variants or DEFAULTS["cuda" if on_gpu else "cpu"])
    engines, unavailable = resolved(workload, asked, arguments.device)
    folder = folder_for(arguments.output, re.sub("[/:]", "-", workload.name))

    console = terminal()
    profile = measure(
        workload,
        engines,
        unavailable,
        rounds=arguments.rounds,
        steps=arguments.steps,
        folder=folder,
        keep_traces=arguments.trace,
        say=partial(console.print, markup=False, highlight=False, soft_wrap=True),
    )
    rows = rows_of(profile)
    write_csv(rows, folder / "profile.csv")
    plot(profile, folder / "profile.png")
    write_json(folder / "profile.json", raw(profile))
    show(profile, console)
    print(f"{folder}: profile.json, profile.csv, profile.png" + (", trace-*.json.gz" if arguments.trace else ""))


if __name__ == "__main__":
    run_command(main)
