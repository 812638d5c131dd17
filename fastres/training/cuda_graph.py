"""Capture a whole step as one CUDA graph: gather, augment, forward, loss, backward, update, metrics.

    recorder = CudaRecorder(device)
    step = GraphedStep(train_step, resident_loader, lr_at, recorder)
    for i, batch in enumerate(step.train(first, last), first):
        step(*batch, lr_at(i), i)

With a CUDA graph, a step costs the host one launch. Every replay does the same work on the same memory and uses the
Python numbers of the recording. It must not synchronise with the host, keep memory for the next replay, or use an
autograd graph made before the replay. The recorder of testing/op_recorder.py runs on a CPU and replays a list of
operators. It is no faster than running them, but enforces these rules, so tests on any machine find code that breaks
them.

Values that differ from step to step reach the graph through memory. The random draws, learning rates and step numbers
of a block of steps are copied to the device before the block's first step. Each replay reads the row that a counter on
the device points to, and increments the counter, so a block may be shorter than the table, for example at a run's end.

CudaRecorder has not yet run on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastres.data.augment import Draws
from fastres.training.evaluator import Evaluator
from fastres.training.step import Batch, TrainStep, compiled, preserving
from fastres.utils.errors import RunError, first_line
from fastres.utils.timing import gc_paused

BLOCK_STEPS = 256  # steps whose draws are copied together: 0.8 MB per block at 128 images a step
WARM_UP = 3  # runs before the capture, in which cuDNN chooses its algorithms and Triton its configurations

Work = Callable[[], object]
NoBatch = tuple[()]  # an empty batch, because the graph makes the real one


class CannotRecord(RuntimeError):
    """Raised by testing/op_recorder.py if a replay would not do what the work did. CudaRecorder raises torch's."""


class Recording(Protocol):
    """Recorded work, such as a torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        """Run the work again, on the same memory."""


class Recorder(Protocol):
    """An object that records a device's operations once, to replay them later."""

    def record(self, work: Work, mutated: Sequence[Tensor]) -> Recording:
        """Record the device operations that `work` launches.

        `work` may run several times; the tensors in `mutated` are restored afterwards.

        Args:
            work: runs the same operators at each call.
            mutated: all tensors from outside that `work` writes to.

        Returns:
            The recording. Each replay writes the tensors that `work` creates to the same addresses. The caller must
            keep all tensors alive that `work` uses.

        Raises:
            RuntimeError: if `work` cannot be recorded; testing/op_recorder.py raises CannotRecord.
        """


# ------------------------------------------------------------------------------------------- steps


class Batches(Protocol):
    """The batches of a captured step: see ResidentLoader."""

    compiles: bool  # inductor may compile batch(): the results are bitwise identical

    def draws(self, first_step: int, last_step: int) -> Draws:
        """Return the draws of the steps [first_step, last_step): (steps, ...) each, on the host."""

    def batch(self, draws: Draws) -> Batch:
        """Return one step's batch from its row of draws, (...) each, on the device."""


class Evaluations(Protocol):
    """The batches of a captured evaluation: see ResidentLoader."""

    def eval_draws(self) -> Draws:
        """Return the draws of all batches: index (batches, b) int64, count (batches,) int64, on the host."""

    def eval_batch(self, index: Tensor, count: int | Tensor) -> Batch:
        """Return the batch of samples `index`, (b,) int64, on the device; labels from `count` on are IGNORED."""


class FixedBatch:
    """The same batch at every step, for measurements."""

    compiles = True

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def draws(self, first_step: int, last_step: int) -> Draws:
        """Return no draws, because the batch is always the same."""
        return {}

    def batch(self, draws: Draws) -> Batch:
        """Return the batch."""
        return self.images, self.labels


class DeviceTable:
    """A table on the device that captured work reads row by row. Its memory never moves.

    Args:
        columns: tensors (n, ...) by name. They give the columns' shapes and dtypes; the table itself starts as zeros.
        rows: the number of rows.
        device: the table's device.
    """

    def __init__(self, columns: Draws, rows: int, device: torch.device) -> None:
        self.rows = rows
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._columns = {
            name: torch.zeros((rows, *values.shape[1:]), dtype=values.dtype, device=device)
            for name, values in columns.items()
        }

    @property
    def mutated_tensors(self) -> list[Tensor]:
        """Return the tensors that reading a row changes."""
        return [self._next]

    def fill(self, columns: Draws) -> None:
        """Overwrite the first rows and rewind to row 0.

        `columns` has at most `rows` rows; rows beyond them keep old values. The copy is queued on the current stream,
        so work that is already queued there still reads the previous rows. The host does not wait for the copy.
        """
        for name, values in columns.items():
            rows = self._columns[name][: len(values)]
            rows.copy_(values.pin_memory() if rows.is_cuda else values, non_blocking=True)
        self.rewind()

    def rewind(self) -> None:
        """Make row 0 the next one."""
        self._next.zero_()

    def next_row(self) -> Draws:
        """Return the next row, (...) by name, and increment the counter, without a host-device synchronisation."""
        row = {name: values.index_select(0, self._next)[0] for name, values in self._columns.items()}
        self._next += 1
        return row


class GraphedStep:
    """A TrainStep and its batches captured together. It is called like a TrainStep.

    Args:
        step: the step, already compiled if its engine compiles.
        batches: makes each step's batch from its draws.
        lr_at: returns the learning rate of a step, before it is scaled for a parameter group.
        recorder: captures the step.
    """

    def __init__(self, step: TrainStep, batches: Batches, lr_at: Callable[[int], float], recorder: Recorder) -> None:
        self.step, self.batches, self.lr_at = step, batches, lr_at
        # A list, because dynamo guards a dict's keys by identity and would recompile for each further run in a process.
        self._rates = list(step.learning_rates)
        # The graph stores the table's addresses, not its values, so the table may hold zeros during the recording; its
        # effects on weights, metrics and the row counter are undone. train() fills the table.
        self._table = DeviceTable(self._columns(range(0)), BLOCK_STEPS, step.engine.device)
        compiles = step.inner.compiled and batches.compiles
        self._read = compiled(self.read_row) if compiles else self.read_row
        self._remaining: Iterator[int] = iter(())  # the steps of the block that have not run
        self.recording = recorder.record(self._work, [*step.mutated_tensors, *self._table.mutated_tensors])

    def train(self, first_step: int, last_step: int) -> Iterator[NoBatch]:
        """Yield an empty batch for each step of [first_step, last_step), as a loader yields batches."""
        rows = self._table.rows
        blocks = [range(i, min(i + rows, last_step)) for i in range(first_step, last_step, rows)]
        columns = self._columns(blocks[0]) if blocks else {}
        for block, following in itertools.zip_longest(blocks, blocks[1:]):
            self._table.fill(columns)
            self._remaining = iter(block)
            for i in block:
                yield ()
                # Draw the next block now, while the device still has queued steps to run.
                if following and i == block[len(block) // 2]:
                    columns = self._columns(following)

    def __call__(self, lr: float, step: int) -> None:
        """Run step `step`, which must be the next one of train(), at the learning rate lr_at(step).

        Args:
            lr: lr_at(step).
            step: the step's number.

        Raises:
            ValueError: if `step` or `lr` is not the one that train() prepared.
        """
        due = next(self._remaining, None)
        if step != due or lr != self.lr_at(step):
            raise ValueError(f"step {step} at learning rate {lr} is not the step that train() prepared: step {due}")
        self.recording.replay()

    def _columns(self, steps: range) -> Draws:
        """Return the draws, step numbers and learning rates of these steps, (steps, ...) each.

        The rates are rounded to the dtype of the step's learning rates, as TrainStep.__call__ rounds them.
        """
        scales = self.step.learning_rates.values()
        rates = [[self.lr_at(i) * scale for scale in scales] for i in steps]
        return {
            **self.batches.draws(steps.start, steps.stop),
            "step": torch.tensor(steps, dtype=torch.int64),
            "rates": torch.tensor(rates, dtype=self.step.lr.dtype).reshape(len(steps), len(scales)),
        }

    def read_row(self) -> Batch:
        """Set the learning rates and step number from the table's next row, and return the row's batch."""
        row = self._table.next_row()
        for tensor, rate in zip(self._rates, row["rates"].unbind(), strict=True):
            tensor.copy_(rate)
        self.step.metrics.step.copy_(row["step"])
        return self.batches.batch(row)

    def _work(self) -> None:
        """Run one step on the next row's batch."""
        images, labels = self._read()
        # Detach the images, because a FixedBatch whose images require a gradient would keep it between replays.
        self.step.run_on_device(images.detach().requires_grad_(images.requires_grad), labels)


def capture(step: TrainStep, loader: Batches, lr_at: Callable[[int], float]) -> GraphedStep:
    """Capture a step and its batches as one CUDA graph, for a loop of one's own.

        step = capture(step, loader, lr_at)
        for i, batch in enumerate(step.train(first, last), first):
            step(*batch, lr_at(i), i)

    Args:
        step: the step, on a GPU.
        loader: the training loader, build_loader()'s with data.loader resident.
        lr_at: returns the learning rate of a step.

    Returns:
        The captured step. Its train() yields empty batches, because the graph makes the real ones.

    Raises:
        RuntimeError: if the step cannot be captured. torch raises its own types of it.
    """
    return GraphedStep(step, loader, lr_at, CudaRecorder(step.engine.device))


class GraphedEvaluation:
    """An evaluation captured for one batch and replayed for each batch: `found = evaluator(graphed.evaluate())`.

    The replays add to the sums of the evaluator that was captured, so pass evaluate() to that one. They compute in
    eval mode, whatever the model's `training` flag says.

    Args:
        evaluator: evaluates one batch. Its model is left in eval mode; a step sets training mode itself.
        batches: the split's batches.
        recorder: captures the evaluation of one batch.
    """

    def __init__(self, evaluator: Evaluator, batches: Evaluations, recorder: Recorder) -> None:
        self.evaluator, self.batches = evaluator, batches
        columns = batches.eval_draws()  # they are the same at every evaluation
        self._table = DeviceTable(columns, len(columns["index"]), evaluator.sums.loss.device)
        self._table.fill(columns)
        self.recording = recorder.record(self._work, [*evaluator.sums.tensors, *self._table.mutated_tensors])

    def evaluate(self) -> Iterator[NoBatch]:
        """Replay the evaluation for each batch of the split, and yield an empty batch after each replay."""
        self._table.rewind()
        for _ in range(self._table.rows):
            self.recording.replay()
            yield ()

    @torch.no_grad()
    def _work(self) -> None:
        """Evaluate the next row's batch and add it to the evaluator's sums."""
        self.evaluator.model.eval()
        row = self._table.next_row()
        self.evaluator.add(*self.batches.eval_batch(row["index"], row["count"]))


def capture_if_enabled(
    step: TrainStep,
    evaluator: Evaluator,
    training: Any,
    evaluation: Any,
    lr_at: Callable[[int], float],
    say: Callable[[str], None],
    recorder: Recorder | None = None,
) -> tuple[Callable[..., None], Any, Any]:
    """Capture the training step and the evaluation during training, if the resolved engine has CUDA graphs.

    Args:
        step: the step, already compiled if its engine compiles.
        evaluator: evaluates the curve during training.
        training: the training loader; a Batches if the engine has CUDA graphs.
        evaluation: the curve's loader; an Evaluations if the engine has CUDA graphs.
        lr_at: returns the learning rate of a step, before it is scaled for a parameter group.
        say: prints a line. It is called with the reason if the setting is auto and a capture fails.
        recorder: captures both; None for CUDA graphs.

    Returns:
        Three objects: call the first at each step, iterate over train() of the second and evaluate() of the third.
        With CUDA graphs they are a GraphedStep, the same GraphedStep, and a GraphedEvaluation. Without CUDA graphs, or
        if auto falls back because either capture failed, they are `step`, `training` and `evaluation`, unchanged.

    Raises:
        RunError: if a capture fails and the setting engine.cuda_graph is true.
    """
    engine = step.engine
    if not engine.cuda_graph:
        return step, training, evaluation
    try:
        recorder = recorder or CudaRecorder(engine.device)
        graphed = GraphedStep(step, training, lr_at, recorder)
        return graphed, graphed, GraphedEvaluation(evaluator, evaluation, recorder)
    except Exception as error:
        step.abort_step()
        why = first_line(error)
        if not engine.cuda_graph_may_fall_back:
            raise RunError(f"engine.cuda_graph true: cannot be captured ({why}); set it to auto") from error
        say(f"cuda_graph: false (cannot be captured: {why})")
        return step, training, evaluation


# ------------------------------------------------------------------------------------------- on a GPU


class CudaRecorder:
    """Capture work as CUDA graphs. It has not yet run on a GPU.

    All graphs of a recorder share one memory pool, so the evaluation reuses the step's memory. They may be replayed in
    any order, because each graph writes pooled memory before it reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # the default stream cannot be captured
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work, mutated: Sequence[Tensor]) -> Recording:
        """Record `work` as Recorder.record does."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        # Warm up on the stream of the capture, because torch keeps some memory per stream (cuBLAS's workspace).
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    with preserving(mutated):
                        work()
                graph = torch.cuda.CUDAGraph()
                # Capturing runs nothing, so no memory has to be restored. The error mode stays "global", the strictest:
                # the only other thread that uses the device is autograd's, which is part of the capture.
                with capturing(graph, pool=self.pool, stream=self.stream):
                    work()
        finally:  # also if the work fails: the step may then continue without a graph, from the restored state
            current.wait_stream(self.stream)
        return graph  # the graph does not keep the captured tensors alive: see Recorder.record


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """Capture the block with torch.cuda.graph while the garbage collector is paused.

    If the collector destroyed a graph of an earlier run in this process, the capture would fail (pytorch#195397). If
    the block raises, ending the capture raises too; the block's error is the one that leaves this function.
    """
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
            raise inside  # noqa: B904, an error of ending the capture becomes its context
        raise
