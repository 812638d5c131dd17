"""A whole step as one recording that is replayed: gather, augment, forward, loss, backward, update, totals.

    recorder = recorder_for(device)
    step = GraphedStep(train_step, resident_loader, lr_at, recorder)
    for i, batch in enumerate(step.train(first, last), first):
        step(*batch, lr_at(i), i)

On a GPU a recording is a CUDA graph, and a step costs the host one launch. On a CPU it is a list of operators, which
gains nothing and keeps a graph's rules, so that what relies on them is tested anywhere: the same work on the same
memory at every replay, Python's numbers as they were, nothing that waits for a value, nothing kept between replays, no
graph of gradients from before.

What differs from step to step reaches the recording through memory: the draws, the learning rates and the numbers of a
block of steps are copied to the device before the first of them, and each replay takes the row that a counter on the
device points to, and moves the counter on. So a block may end anywhere: a run's last steps, a resumed run's first.

Not yet run on a GPU: CudaRecorder.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fastres.data.augment import Draws
from fastres.training.step import Batch, Evaluator, TrainStep, compiled, unchanged
from fastres.utils.errors import RunError, first_line
from fastres.utils.timing import gc_paused

BLOCK_STEPS = 256  # whose draws are copied at once: 0.8 MB at 128 images a step
WARM_UP = 3  # runs before the one that is recorded: cuDNN chooses its algorithms, Triton its configurations

Work = Callable[[], object]
NoBatch = tuple[()]  # the recording makes its own


class CannotRecord(RuntimeError):
    """Work that would not do the same when it is replayed."""


class Recording(Protocol):
    def replay(self) -> None:
        """Does the work once more, on the memory that it had."""


class Recorder(Protocol):
    def record(self, work: Work, changed: Sequence[Tensor]) -> Recording:
        """Records what `work` does on the device; none of it shows afterwards. changed: all tensors from outside
        that it writes to. What it makes and leaves behind, a replay makes anew in the same place."""


def recorder_for(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else OpRecorder(device)


# ------------------------------------------------------------------------------------------- steps


class Batches(Protocol):
    """What a step's batch is made from, and how: see ResidentLoader."""

    compiles: bool  # whether batch() has the same bits when inductor compiles it

    def draws(self, first_step: int, last_step: int) -> Draws: ...

    def batch(self, draws: Draws) -> Batch: ...


class Evaluations(Protocol):
    def eval_draws(self) -> Draws: ...

    def eval_batch(self, index: Tensor, count: int | Tensor) -> Batch: ...


class FixedBatch:
    """The same batch at every step, for measurements."""

    compiles = True

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def draws(self, first_step: int, last_step: int) -> Draws:
        return {}

    def batch(self, draws: Draws) -> Batch:
        return self.images, self.labels


class DeviceTable:
    """A table on the device that recorded work reads row by row.

    columns: (rows, ...) each. The memory stays where it is, whatever is filled in.
    """

    def __init__(self, columns: Draws, rows: int, device: torch.device) -> None:
        self.rows = rows
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._columns = {
            name: torch.zeros((rows, *values.shape[1:]), dtype=values.dtype, device=device)
            for name, values in columns.items()
        }

    @property
    def changed(self) -> list[Tensor]:
        """By take()."""
        return [self._next]

    def fill(self, columns: Draws) -> None:
        """The first rows, of which the next one is the first. The device takes them when it comes to it: what is queued
        before still has the former ones."""
        for name, values in columns.items():
            rows = self._columns[name][: len(values)]
            rows.copy_(values.pin_memory() if rows.is_cuda else values, non_blocking=True)
        self.rewind()

    def rewind(self) -> None:
        self._next.zero_()

    def take(self) -> Draws:
        """The next row; nothing waits for its number."""
        row = {name: values.index_select(0, self._next)[0] for name, values in self._columns.items()}
        self._next += 1
        return row


class GraphedStep:
    """TrainStep and its batches as one recording, called as they are.

    lr_at: the learning rate of every step, before any is scaled for a group.
    """

    def __init__(
        self, step: TrainStep, batches: Batches, lr_at: Callable[[int], float], recorder: Recorder
    ) -> None:
        self.step, self.batches, self.lr_at = step, batches, lr_at
        # A list: dynamo takes a dict's keys for those very tensors, and would compile every run of a process anew.
        self._rates = list(step.learning_rates)
        self._rows = DeviceTable(self._columns(range(0)), BLOCK_STEPS, step.engine.device)
        compiles = step.inner.compiled and batches.compiles
        self._next_batch = compiled(self.next_batch) if compiles else self.next_batch
        self._due: Iterator[int] = iter(())  # the steps of the block that have not been taken
        self.recording = recorder.record(self._work, [*step.changed, *self._rows.changed])

    def train(self, first_step: int, last_step: int) -> Iterator[NoBatch]:
        """As a loader's: what a step has to be called with, for each of [first_step, last_step)."""
        rows = self._rows.rows
        blocks = [range(i, min(i + rows, last_step)) for i in range(first_step, last_step, rows)]
        columns = self._columns(blocks[0]) if blocks else {}
        for block, following in itertools.zip_longest(blocks, blocks[1:]):
            self._rows.fill(columns)
            self._due = iter(block)
            for i in block:
                yield ()
                if following and i == block[len(block) // 2]:  # while the device has steps to take
                    columns = self._columns(following)

    def __call__(self, lr: float, step: int) -> None:
        """Takes step `step`, which has to be the next one of train(), at the learning rate lr_at(step)."""
        due = next(self._due, None)
        if step != due or lr != self.lr_at(step):
            raise ValueError(f"step {step} at learning rate {lr} is not what was filled in: step {due}")
        self.recording.replay()

    def _columns(self, steps: range) -> Draws:
        """(steps, ...) each: the draws, the steps' numbers, and the learning rates, rounded as fill_() would."""
        scales = self.step.learning_rates.values()
        rates = [[self.lr_at(i) * scale for scale in scales] for i in steps]
        return {
            **self.batches.draws(steps.start, steps.stop),
            "step": torch.tensor(steps, dtype=torch.int64),
            "rates": torch.tensor(rates, dtype=self.step.lr.dtype).reshape(len(steps), len(scales)),
        }

    def next_batch(self) -> Batch:
        """The batch of the next row, whose learning rates and number are in their places after it."""
        row = self._rows.take()
        for tensor, rate in zip(self._rates, row["rates"].unbind(), strict=True):
            tensor.copy_(rate)
        self.step.totals.step.copy_(row["step"])
        return self.batches.batch(row)

    def _work(self) -> None:
        images, labels = self._next_batch()
        # If they ask for a gradient, for one that goes with the step.
        self.step.take(images.detach().requires_grad_(images.requires_grad), labels)


class GraphedEvaluation:
    """A loader's evaluation, each batch of it one replay, for that Evaluator's call."""

    def __init__(self, evaluate: Evaluator, batches: Evaluations, recorder: Recorder) -> None:
        self.evaluator, self.batches = evaluate, batches
        columns = batches.eval_draws()  # the same at every evaluation
        self._rows = DeviceTable(columns, len(columns["index"]), evaluate.totals.loss.device)
        self._rows.fill(columns)
        self.recording = recorder.record(self._work, [*evaluate.totals.tensors, *self._rows.changed])

    def evaluate(self) -> Iterator[NoBatch]:
        self._rows.rewind()
        for _ in range(self._rows.rows):
            self.recording.replay()
            yield ()

    @torch.no_grad()
    def _work(self) -> None:
        self.evaluator.model.eval()
        row = self._rows.take()
        self.evaluator.add(*self.batches.eval_batch(row["index"], row["count"]))


def recorded(
    step: TrainStep,
    evaluate: Evaluator,
    training: Any,
    evaluation: Any,
    lr_at: Callable[[int], float],
    say: Callable[[str], None],
) -> tuple[Callable[..., None], Any, Any]:
    """What the loop calls for a step, and what gives it its batches for training and for the curve: recordings, where
    the engine has them, else what it was given.

    Where recording was auto's choice and does not work, `say` is told so.
    """
    engine = step.engine
    if not engine.cuda_graph:
        return step, training, evaluation
    try:
        recorder = recorder_for(engine.device)
        graphed = GraphedStep(step, training, lr_at, recorder)
        return graphed, graphed, GraphedEvaluation(evaluate, evaluation, recorder)
    except Exception as error:
        step.abort_step()
        why = first_line(error)
        if not engine.cuda_graph_may_fall_back:
            raise RunError(
                f"engine.cuda_graph true: the step has no graph ({why}); leave it at auto"
            ) from error
        say(f"cuda_graph: false (the step has no graph: {why})")
        return step, training, evaluation


# ------------------------------------------------------------------------------------------- on a GPU


class CudaRecorder:
    """CUDA graphs. Not yet run on a GPU.

    All graphs of a recorder share their memory: each writes what it reads before it reads it, so that one may be
    replayed after another in any order, and an evaluation needs no memory beside the training's.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # capturing the default one is not possible
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work, changed: Sequence[Tensor]) -> Recording:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        # The same stream to warm up and to capture: what torch keeps by stream, cuBLAS's workspace, is there then.
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    with unchanged(changed):
                        work()
                graph = torch.cuda.CUDAGraph()
                # Capturing runs nothing: there is nothing to put back. Its error mode stays "global", the strictest: no
                # other thread has to do with the device meanwhile, but autograd's, which is a part of it.
                with capturing(graph, pool=self.pool, stream=self.stream):
                    work()
        finally:  # where the work fails, the step without a graph goes on from what was put back
            current.wait_stream(self.stream)
        return graph  # who asked for it holds what it has the addresses of


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """torch.cuda.graph, during which no garbage is collected: a graph that is destroyed meanwhile, of an earlier run in
    this process, ends the capture (pytorch#195397). An error inside is the one that is raised: the end of a failed
    capture is an error of its own."""
    inside: BaseException | None = None
    try:
        with gc_paused(), torch.cuda.graph(graph, **how):
            try:
                yield
            except BaseException as error:
                inside = error
                raise
    except Exception:
        if inside is not None:
            raise inside  # noqa: B904, its own context is kept
        raise


# ------------------------------------------------------------------------------------------- on a CPU

# Whose memory is as it is found: there is nothing to do again.
UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# Torch's tags of operators that give, or whose size is, what only the device knows.
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Reads that on a CPU are not operators.
READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu, Tensor.__repr__)


class OpRecorder:
    """Operators with the tensors that they read and wrote, as autograd and the optimizer called them, called again.

    What is made on the way stays in memory, so this is for small networks. What inductor compiles it does not see.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, work: Work, changed: Sequence[Tensor]) -> Recording:
        leaves = [tensor for tensor in changed if tensor.requires_grad]
        if any(map(_in_a_graph, leaves)):
            gc.collect()  # as capturing() does
        if held := sum(map(_in_a_graph, leaves)):
            raise CannotRecord(
                f"a graph of gradients of {held} tensors is still held: it is of the stream that it was made on, and "
                "would draw that stream into a capture"
            )
        watches, kept = list[_Watch](), list[int]()
        for _ in range(WARM_UP):
            watches.append(_Watch(self.device))
            with unchanged(changed), watches[-1].watching():
                work()
            watches[-1].check(changed)
            kept.append(sum(watch.kept_bytes() for watch in watches))
        if kept[-1] > kept[-2]:
            raise CannotRecord(
                f"the work holds {kept[-1] - kept[-2]} bytes more each time: replays would all write to the same ones"
            )
        recording = _HostRecording()
        with unchanged(changed), _Watch(self.device, recording).watching():
            work()
        recording.held_bytes = recording.count_bytes()
        return recording


@dataclass
class _Call:
    """One operator. made: the tensors that it makes, each with its place among all that it returns."""

    operator: Any
    args: Any
    kwargs: Any
    made: dict[int, Tensor]

    def again(self) -> None:
        results = _tensors(self.operator(*self.args, **self.kwargs))
        for place, tensor in self.made.items():
            if results[place].shape != tensor.shape:
                was, now = tuple(tensor.shape), tuple(results[place].shape)
                raise CannotRecord(f"{self.operator} made {was} when it was recorded, and makes {now}")
            tensor.copy_(results[place])


@dataclass
class _HostRecording:
    calls: list[_Call] = field(default_factory=list)
    held_bytes: int = 0  # of all that the calls read and write

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.calls:
            call.again()
        if (now := self.count_bytes()) != self.held_bytes:
            raise CannotRecord(f"a replay has changed what it holds from {self.held_bytes} to {now} bytes")

    def count_bytes(self) -> int:
        held = (tensor for call in self.calls for tensor in _tensors((call.args, call.kwargs, call.made)))
        return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in held}.values())


class _Watch(TorchDispatchMode):
    """Sees the operators, refuses those that a graph cannot hold, and adds the others to the recording, if any."""

    def __init__(self, device: torch.device, recording: _HostRecording | None = None) -> None:
        super().__init__()
        self.device, self.recording = device, recording
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}  # with the operators' results: storage, bytes
        self.found: dict[int, tuple[Tensor, Tensor]] = {}  # what came from outside, and its first values

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _Reads(), self:
            yield

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if why := _why_not(operator, args):
            raise CannotRecord(_at(f"{operator} {why}"))
        given = _tensors((args, kwargs))
        storages = {_storage(tensor) for tensor in given}
        for tensor in given if self.recording is None else ():
            if _storage(tensor) not in self.made and _storage(tensor) not in self.found:
                self.found[_storage(tensor)] = tensor.detach(), _bytes(tensor).clone()
        out = operator(*args, **kwargs)
        results = _tensors(out)
        if any(tensor.device != self.device for tensor in (*given, *results)):
            raise CannotRecord(_at(f"{operator} takes a tensor from or to another device than {self.device}"))
        made = {place: tensor for place, tensor in enumerate(results) if _storage(tensor) not in storages}
        for tensor in made.values():
            storage = tensor.untyped_storage()
            self.made[_storage(tensor)] = StorageWeakRef(storage), storage.nbytes()
        writes = made or operator._schema.is_mutable  # else it only looks at memory in another way
        if self.recording is not None and writes and operator.overloadpacket.__name__ not in UNWRITTEN:
            # Aliases without autograd's part: a recording holds memory, and no graph of gradients.
            kept = tree_map_only(Tensor, Tensor.detach, (args, kwargs, made))
            self.recording.calls.append(_Call(operator, *kept))
        return out

    def kept_bytes(self) -> int:
        """What the work has made and is still there."""
        return sum(size for storage, size in self.made.values() if not storage.expired())

    def check(self, changed: Sequence[Tensor]) -> None:
        """That the work wrote to nothing but what is said to change."""
        told = {_storage(tensor) for tensor in changed}
        for storage, (tensor, before) in self.found.items():
            if storage not in told and not torch.equal(_bytes(tensor), before):
                raise CannotRecord(f"the work writes to a tensor {tuple(tensor.shape)}, not said to change")


class _Reads(TorchFunctionMode):
    """Refuses what reads a tensor's values without an operator."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            raise CannotRecord(_at(f"Tensor.{function.__name__} makes the host wait for the device"))
        return function(*args, **(kwargs or {}))


def waits(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host has to have a device's values before it can go on."""
    if operator in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masked and (len(args) < 3 or args[2].numel() > 1)  # one value only fills where the mask is
    return not WAITS.isdisjoint(operator.tags)


def _why_not(operator: Any, args: tuple[Any, ...]) -> str | None:
    """What keeps an operator out of a graph, if something does."""
    if waits(operator, args):
        return "makes the host wait for the device"
    if operator is torch.ops.aten.lift_fresh.default:
        return "takes a tensor that was made from numbers on the host, which would have to be copied at each replay"
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return "draws random numbers, which recording would use up"
    return None


def _at(what: str) -> str:
    """`what`, with the innermost line outside of torch and of this file that led to it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and name.partition(".")[0] != "torch":
            return f"{what} ({name}, line {frame.f_lineno})"
        frame = frame.f_back
    return what


def _in_a_graph(leaf: Tensor) -> bool:
    """Whether an autograd graph of it is alive: as long as one is, the node that accumulates its gradient stays the
    same, with the stream that it was made on (pytorch#180090)."""

    def metadata() -> Any:  # of that node: a dict of its own
        return get_gradient_edge(leaf).node.metadata

    metadata()["seen"] = True
    return "seen" in metadata()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    """The same number for all that share memory."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> Tensor:
    """The memory that it is a view of: (bytes,) uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
