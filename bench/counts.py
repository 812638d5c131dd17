"""Count the work of a step of ResNet-20, as a regression gate. All counts are the same on every machine, and no times.

    python -m bench.counts                         from the checkout's root: the table; no GPU, two minutes of CPU time
    python -m bench.counts --check                 exit status 1 if a count is above bench/expected_counts.json
    python -m bench.counts --write                 store the counts in that file, to accept a rise or to keep a fall
    python -m bench.counts --check --only graph    one group, or several with commas

The recipe cifar10-resnet20 runs on the CPU, in the precision of a GPU. The groups are:

operators   calls of torch's operators in eager execution, for a training step by its parts, an evaluation batch, and
            the resident loader.
host        calls that would block the host on a GPU: synchronisations, which read a device's value (.item(), bool(),
            .tolist(), print, nonzero, a mask as index), and copies, which move a tensor (.to(device), torch.tensor).
            On the CPU nothing blocks, but the calls are visible.
graph       graph breaks, graphs and recompilations of forward and loss under torch.compile, while learning rate and
            step change and evaluation alternates with training. Dynamo and AOTAutograd run as they do for inductor.
block       kernels besides the convolutions, and their bytes, of a basic block compiled for an H100
            (kernels/analysis/inductor_counts.py).
network     launches of a recorded step, convolutions included, counted in the same way: making the batch on the
            device, the network's forward with the loss, its backward, and the metrics. The optimizer's launches are
            left out, because torch makes them. The rows "convolutions" have the fused convolutions, which launch one
            kernel for each of their gradients; torch's backward of a convolution counts as one launch and is two
            kernels or more. The images have 16 channels, because inductor_counts counts activations of that shape.

The counts of operators, block and network depend on torch and are stored per version. A version that the file lacks is
not compared. Versions 2.11 and 2.14 agreed in all counts when this was written.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.config.cli import parse
from fastres.config.schema import Config
from fastres.data.loaders.build import classes_of
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source
from fastres.models.registry import build_model
from fastres.testing.op_recorder import READS, forces_sync
from fastres.training.build import build_network, split_loader
from fastres.training.cuda_graph import GraphedStep
from fastres.training.engine import Engine, resolve_engine
from fastres.training.evaluator import Evaluator
from fastres.training.step import ForwardLoss, TrainStep
from fastres.utils.errors import Parser, UsageError, run_command
from fastres_kernels.analysis.text_table import table
from fastres_kernels.report import count_blocks
from fastres_kernels.triton_launch import HAS_TRITON, INTERPRETED

CHECKOUT = Path(__file__).parent.parent
PACKAGES = ("fastres", "kernels", "fastres_kernels")  # folders of the checkout
EXPECTED = Path(__file__).with_name("expected_counts.json")
NAME = EXPECTED.relative_to(CHECKOUT)
WRITE = "python -m bench.counts --only {} --write"
TORCH = ".".join(torch.__version__.split(".")[:2])
EVERY_TORCH = "every torch"  # the file's key for groups that do not depend on torch's version
RECIPE = (
    "--recipe cifar10-resnet20 --data.source synthetic --data.image_size 32 "
    "--model.norm torch --engine.conv torch --engine.device cpu --engine.compile false"
)
BATCH = 8  # images of a step whose operators are counted; more images would make the same calls


class Count(NamedTuple):
    value: float
    where: str = ""  # the places that were counted


Counts = dict[str, Count]


# ---- observing what runs -----------------------------------------------------------------------------------

PARTS = ("forward", "backward", "optimizer", "the rest")
COPIES = (Tensor.cuda, torch.tensor, torch.as_tensor)


@dataclass
class Observation:
    """Calls of operators by part, and the places in the code at which the host read or moved a tensor."""

    part: str = "the rest"
    operators: Counter[str] = field(default_factory=Counter)
    reads: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    def enter(self, part: str) -> None:
        self.part = part


class Functions(TorchFunctionMode):
    """Observe the functions that are called on tensors."""

    def __init__(self, observed: Observation) -> None:
        super().__init__()
        self.observed = observed

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = function is Tensor.to and any(
            isinstance(to, torch.device | str | Tensor) for to in (*args[1:], *kwargs.values())
        )
        if function in READS:
            self.observed.reads.append(here(function.__name__))
        elif (function in COPIES or moves) and in_packages(sys._getframe(1)):  # torch calls .to() too
            self.observed.copies.append(here(function.__name__))
        elif function is Tensor.backward:
            self.observed.enter("backward")
        result = function(*args, **kwargs)
        if function is Tensor.backward:
            self.observed.enter("the rest")
        return result


class Operators(TorchDispatchMode):
    """Observe the operators that run for functions on tensors, and for autograd."""

    def __init__(self, observed: Observation) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.observed = observed

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace != "profiler":
            self.observed.operators[self.observed.part] += 1
        if forces_sync(operator, args):
            self.observed.reads.append(here(str(operator)))
        return operator(*args, **(kwargs or {}))


def in_packages(frame: FrameType) -> bool:
    """Return True if the frame runs code of the packages. The checkout may contain an environment too."""
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(CHECKOUT) and path.relative_to(CHECKOUT).parts[0] in PACKAGES


def here(what: str) -> str:
    """Return `what` with the innermost line of the packages that led to it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if in_packages(frame):
            return f"{what} at {Path(frame.f_code.co_filename).relative_to(CHECKOUT)}:{frame.f_lineno}"
        frame = frame.f_back
    return what


@contextmanager
def observing() -> Iterator[Observation]:
    """Observe what the block runs."""
    observed = Observation()
    with Functions(observed), Operators(observed):
        yield observed


# ---- the recipe's parts ------------------------------------------------------------------------------------


def the_recipe(precision: str = "bf16") -> tuple[Config, Engine]:
    """Return the recipe's configuration and engine, on the CPU and eager."""
    config = parse([*RECIPE.split(), "--engine.precision", precision])
    engine = resolve_engine(config)
    engine.apply_torch_settings()
    return config, engine


@cache
def the_source() -> Source:
    """Load the recipe's data once."""
    return load_source(the_recipe()[0].data)


def build(config: Config, engine: Engine) -> tuple[TrainStep, Evaluator]:
    """Build the step and the evaluator, as training/build.py does."""
    model = build_network(config, engine, the_source())
    step = TrainStep(model, engine, config.optim, config.train.label_smoothing)
    return step, Evaluator(model, engine, classes_of(config, the_source()))


def a_batch(engine: Engine) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    images = torch.randn(BATCH, 3, 32, 32, dtype=engine.dtype).to(memory_format=engine.memory_format)
    return images, torch.randint(10, (BATCH,))


@cache
def trained(precision: str) -> Observation:
    """Run a training step other than the first."""
    step, _ = build(*the_recipe(precision))
    step(*a_batch(step.engine), 0.1, 0)
    batch = a_batch(step.engine)
    with observing() as observed:
        step.forward_loss.register_forward_pre_hook(lambda *_: observed.enter("forward"))
        step.forward_loss.register_forward_hook(lambda *_: observed.enter("the rest"))
        step.optimizer.register_step_pre_hook(lambda *_: observed.enter("optimizer"))
        step.optimizer.register_step_post_hook(lambda *_: observed.enter("the rest"))
        step(*batch, 0.1, 1)
    return observed


def read_metrics() -> Observation:
    """Read the metrics, as after a step that is logged."""
    step, _ = build(*the_recipe())
    with observing() as observed:
        step.metrics.read()
    return observed


@cache
def evaluated(batches: int) -> Observation:
    """Run an evaluation of that many batches."""
    config, engine = the_recipe()
    _, evaluate = build(config, engine)
    inputs = [a_batch(engine) for _ in range(batches)]
    with observing() as observed:
        evaluate(inputs)
    return observed


def a_loader(config: Config, engine: Engine) -> Any:
    """Return the resident loader of the training images."""
    return split_loader(config, engine, the_source(), the_source().train)


@cache
def loaded() -> tuple[Observation, Observation]:
    """Run the resident loader for its first step, which makes a block, and for all other steps of the block."""
    config, engine = the_recipe()
    loader = a_loader(config, engine)
    steps = loader.order.n // config.train.batch_size
    batches = loader.train(0, steps)
    with observing() as first:
        next(batches)
    with observing() as others:
        assert len(list(batches)) == steps - 1 > 0
    return first, others


# ---- the groups --------------------------------------------------------------------------------------------


def operators() -> Counts:
    """Count operators. The module's docstring describes this group and the others."""
    parts = trained("bf16").operators
    first, others = loaded()
    counts = {f"training step, {part}": parts[part] for part in PARTS}
    counts["training step"] = parts.total()
    counts["evaluation, a batch"] = evaluated(2).operators.total() - evaluated(1).operators.total()
    counts["resident loader, a block"] = first.operators.total()
    counts["resident loader, later steps of it"] = others.operators.total()
    return {name: Count(value) for name, value in counts.items()}


def host() -> Counts:
    """Count synchronisations and copies."""
    first, others = loaded()
    observations = {
        "training step, bf16": trained("bf16"),
        "training step, fp16": trained("fp16"),
        "reading the totals": read_metrics(),
        "evaluation of a batch": evaluated(1),
        "evaluation of two": evaluated(2),
        "resident loader, a block": first,
        "resident loader, later steps of it": others,
    }
    return {
        f"{what}, {name}": Count(len(seen), ", ".join(sorted(set(seen))))
        for what, observed in observations.items()
        for name, seen in (("synchronisations", observed.reads), ("copies", observed.copies))
    }


def graph() -> Counts:
    """Count graph breaks, graphs and recompilations."""
    config, engine = the_recipe()
    counters, compile_ = torch._dynamo.utils.counters, torch.compile
    torch._dynamo.reset()
    counters.clear()

    def compile_with_breaks(function: Any, **options: Any) -> Any:
        """Replace torch.compile, to count breaks instead of raising, and to generate no code."""
        return compile_(function, **options | {"fullgraph": False, "backend": "aot_eager", "options": None})

    with patch.object(torch, "compile", compile_with_breaks):
        step, evaluate = build(config, replace(engine, compile=True))
        batch, graphs = a_batch(engine), []
        for i, lr in enumerate((0.1, 0.01, 0.0, 0.3)):
            step(*batch, lr, i)
            evaluate([batch])
            graphs.append(counters["stats"]["unique_graphs"])
    breaks = counters["graph_break"]
    return {
        "breaks": Count(sum(breaks.values()), "; ".join(" ".join(text.split())[:140] for text in breaks)),
        "graphs, to train, to evaluate, to count": Count(graphs[0]),
        "recompilations": Count(graphs[-1] - graphs[0], "TORCH_LOGS=recompiles tells why"),
    }


def block() -> Counts:
    """Count the kernels and bytes of a compiled basic block."""
    with count_blocks() as counting:
        output, errors = counting.communicate()
    if counting.returncode:
        raise RuntimeError(f"fastres_kernels.analysis.inductor_counts failed:\n{errors}")
    return {
        f"{norm}, {name}, {what}": Count(passes[key])
        for norm, of_norm in json.loads(output).items()
        for name, passes in of_norm.items()
        for what, key in (("kernels", "kernels"), ("bytes/element", "kernel_bytes_per_element"))
    }


def network() -> Counts:
    """Count the launches of a recorded step."""
    from fastres_kernels.analysis import inductor_counts

    class Net(nn.Module):
        """The network with its loss: (128, 16, 32, 32) -> (loss, correct). TrainStep differentiates the loss."""

        def __init__(self, **options: Any) -> None:
            super().__init__()
            config, engine = the_recipe()
            model = build_model(config.model.name, in_channels=inductor_counts.SHAPE[1], **options)
            model = model.to(memory_format=engine.memory_format)
            compiled = replace(engine, compile=True)
            self.forward_loss = ForwardLoss(model, compiled, config.train.label_smoothing)
            self.register_buffer("labels", torch.zeros(inductor_counts.SHAPE[0], dtype=torch.int64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            loss, correct = self.forward_loss(x, self.labels)
            return loss, correct

    def launches(generated: tuple[Any, str]) -> list[inductor_counts.Launch]:
        return inductor_counts.launches(*generated, [])

    config, engine = the_recipe()
    step, _ = build(config, engine)
    records_nothing: Any = SimpleNamespace(record=lambda work, mutated: None)
    graphed = GraphedStep(step, a_loader(config, engine), lambda i: 0.1, records_nothing)
    loss, correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    pieces: dict[str, tuple[Any, ...]] = {
        "the batch": (graphed.read_row,),
        "the totals": (step.add_to_metrics, loss, correct, BATCH),
    }
    counts = {
        f"{name}, launches": Count(len(launches(inductor_counts.generate(*piece)["forward"])))
        for name, piece in pieces.items()
    }
    # The head's matrix products count like convolutions, and move little. The bytes of a variant are not needed.
    head = {f"extern_kernels.{name}": 0 for name in ("addmm", "mm")}
    no_bytes = patch.object(inductor_counts, "variant_of", lambda *_: SimpleNamespace(bytes_per_element=0))
    nets = {
        "torch": Net(norm="torch"),
        "fused": Net(norm="fused"),
        "convolutions": Net(norm="fused", fused_convolutions=True),
    }
    for kind, net in nets.items():
        for name, generated in inductor_counts.generate(net, inductor_counts.an_activation()).items():
            with patch.dict(inductor_counts.CONVOLUTIONS, head), no_bytes:
                found = launches(generated)
            counts[f"{kind}, {name}, launches"] = Count(len(found))
            # With torch's norm every kernel but the convolutions is generated, so the code shows the bytes.
            if kind == "torch":
                moved = inductor_counts.totals(found)["kernel_bytes_per_element"]
                counts[f"{kind}, {name}, bytes/element"] = Count(moved)
    return counts


GROUPS: dict[str, Callable[[], Counts]] = {
    "operators": operators,
    "host": host,
    "graph": graph,
    "block": block,
    "network": network,
}
OF_TORCH = ("operators", "block", "network")  # stored per version of torch
GENERATED = ("block", "network")  # need Triton


# ---- the gate ----------------------------------------------------------------------------------------------


def key_of(group: str) -> str:
    """Return the file's key for a group."""
    return TORCH if group in OF_TORCH else EVERY_TORCH


def count(groups: list[str]) -> dict[str, Counts]:
    """Count the groups. Other processes generate code for an H100, because torch caches whether it sees a GPU."""
    with ProcessPoolExecutor(len(GENERATED), get_context("spawn")) as beside:
        later = {group: beside.submit(GROUPS[group]) for group in groups if group in GENERATED}
        return {group: later[group].result() if group in later else GROUPS[group]() for group in groups}


def judge(counted: dict[str, Counts], expected: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the lines that make the check fail, and the lines of other notes."""
    wrong, notes = [], []
    unknown = [group for group in counted if group in OF_TORCH and TORCH not in expected]
    if unknown:
        notes.append(
            f"not compared: {', '.join(unknown)}, because {NAME} has no counts of torch {TORCH}; to add them: "
            f"{WRITE.format(','.join(unknown))}"
        )
    for group, counts in counted.items():
        if group in unknown:
            continue
        limits, write = expected.get(key_of(group), {}).get(group, {}), WRITE.format(group)
        for name, seen in counts.items():
            what = f"{group}: {name}"
            if name not in limits:
                wrong.append(f"{what} is {seen.value:g} and not in {NAME}; to add it: {write}")
            elif seen.value > limits[name]:
                where = f" ({seen.where})" if seen.where else ""
                wrong.append(
                    f"{what} rose from {limits[name]:g} to {seen.value:g}{where}; to accept it: {write}, and commit "
                    f"{NAME} with the reason"
                )
            elif seen.value < limits[name]:
                notes.append(f"good news: {what} fell from {limits[name]:g} to {seen.value:g}; to keep it: {write}")
        wrong += [
            f"{group}: {name} is in {NAME} and no longer counted; to leave it out: {write}"
            for name in limits
            if name not in counts
        ]
    return wrong, notes


def rows(counted: dict[str, Counts], expected: dict[str, Any]) -> list[list[str]]:
    """Return the table's rows: name, counted, expected."""
    return [
        [f"{group}: {name}", f"{seen.value:g}", f"{limits[name]:g}" if name in limits else "-"]
        for group, counts in counted.items()
        for limits in [expected.get(key_of(group), {}).get(group, {})]
        for name, seen in counts.items()
    ]


def main() -> int:
    # Hide GPUs before torch looks for one, here and in the processes that this one starts.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    parser = Parser(prog="python -m bench.counts", description="Counts of ResNet-20's step, the same on every machine.")
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--check", action="store_true", help=f"Exit with status 1 if a count is above {NAME}.")
    act.add_argument("--write", action="store_true", help=f"Write the counts to {NAME}.")
    parser.add_argument(
        "--only", default=",".join(GROUPS), metavar="GROUPS", help="Groups to count. (default: %(default)s)"
    )
    options = parser.parse_args()
    groups = [group for group in GROUPS if group in options.only.split(",")]
    if set(groups) != set(options.only.split(",")):
        parser.error(f"--only {options.only}: unknown group; the groups are {','.join(GROUPS)}")
    if set(groups) & set(GENERATED) and (INTERPRETED or not HAS_TRITON):
        why = "unset TRITON_INTERPRET" if HAS_TRITON else "pip install triton"
        others = ",".join(group for group in GROUPS if group not in GENERATED)
        raise UsageError(f"{' and '.join(GENERATED)}: compiling kernels needs Triton; {why}, or count --only {others}")

    expected: dict[str, Any] = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    counted = count(groups)
    shown = table([f"ResNet-20, torch {TORCH}", "counted", "expected"], rows(counted, expected))
    if options.write:
        for group, counts in counted.items():
            values = {name: seen.value for name, seen in counts.items()}
            stored = {name: value if value % 1 else int(value) for name, value in values.items()}
            expected.setdefault(key_of(group), {})[group] = stored
        EXPECTED.write_text(json.dumps(expected, indent=2, sort_keys=True, allow_nan=False) + "\n")
    print(shown)
    wrong, notes = judge(counted, expected) if options.check else ([], [])
    for line in notes:
        print(line)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(main)
