"""Compare settings by their accuracy on held-out training samples, several seeds each, to tune a recipe.

    python -m bench.held_out --seeds 5 --recipe cifar10-speedrun --data.root data \
        + --train.steps 300 + --train.steps 300 --optim.muon_lr 0.2

The flags are those of fastres.train, and flags before the first + apply to all settings. Settings run interleaved, so
that an interrupted comparison has as many runs of each. A tenth of the training samples is held out unless
--data.validation is given. The test set's accuracy is neither printed nor stored. A line has the mean ± its standard
error, the mean accuracy of the training batches since the previous evaluation (far above the first mean, the network
overfits, otherwise it underfits), and the median training time, in this process.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.lib.runs import run
from fastres.config.cli import parse
from fastres.data.sources.load import load_source
from fastres.training.step import raise_recompile_limit
from fastres.utils.atomic_io import parse_json, write_json
from fastres.utils.errors import Parser, UsageError, run_command, user_path


@dataclass
class Setting:
    flags: list[str]
    own: str  # the flags of this setting alone, as text
    accuracies: list[float] = field(default_factory=list)  # of the held-out samples, after the last step
    training: list[float] = field(default_factory=list)  # of the training batches since the previous evaluation
    seconds: list[float] = field(default_factory=list)

    def line(self) -> str:
        n, spread = len(self.accuracies), ""
        if n > 1:
            spread = f" ± {statistics.stdev(self.accuracies) / n**0.5:.4f}"
        seconds = statistics.median(self.seconds)
        training = statistics.mean(self.training)
        return f"{self.mean:.4f}{spread} (n={n})  training {training:.4f} {seconds:>9,.2f} s  {self.own}"

    def to_dict(self) -> dict[str, Any]:
        scores = {"accuracies": self.accuracies, "train_accuracies": self.training}
        return {"flags": self.flags, **scores, "train_time_s": self.seconds}

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)


def settings_of(arguments: list[str]) -> list[Setting]:
    """Split the arguments at each +, and join the flags of all settings with those of each."""
    parts: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "+":
            parts.append([])
        else:
            parts[-1].append(argument)
    common, *own = parts
    return [Setting([*common, *flags], " ".join(flags) or "as it is") for flags in own or [[]]]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.held_out",
        usage="%(prog)s [--seeds N] [--output FILE] FLAGS [+ FLAGS]...",
        description=str(__doc__).partition("\n")[0],
        epilog="FLAGS are those of fastres.train: before the first + for all settings, after a + for one setting.",
        renamed={"--json": "--output"},
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="Runs of each setting. (default: 5)")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="JSON file for every accuracy and time.")
    options, arguments = parser.parse_known_args(argv)
    settings = settings_of(arguments)
    data, *others = [parse(setting.flags).data for setting in settings]  # a UsageError comes before anything runs
    if any(other != data for other in others):
        raise UsageError("--data: the settings must have the same data; give --data's flags before the first +")
    source = load_source(data)
    if not data.validation:
        for setting in settings:
            setting.flags += ["--data.validation", str(len(source.train) // 10)]
    raise_recompile_limit(4 * len(settings))  # because each setting trains and evaluates
    try:
        for seed in range(options.seeds):
            for setting in settings:
                with tempfile.TemporaryDirectory() as folder:
                    summary = run(setting.flags, seed, Path(folder), source)
                    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                held_out = [row for row in map(parse_json, lines) if row["split"] == "validation"]
                setting.accuracies.append(held_out[-1]["accuracy"])
                setting.training.append(held_out[-1]["train_accuracy"])
                setting.seconds.append(summary["train_time_s"])
                print(f"seed {seed}: {setting.line()}", flush=True)
    finally:
        done = [setting for setting in settings if setting.accuracies]
        print(*(s.line() for s in sorted(done, key=lambda s: -s.mean)), sep="\n")
        if options.output:
            stored = [setting.to_dict() for setting in done]
            write_json(options.output, stored)
    return 0


if __name__ == "__main__":
    run_command(main)
