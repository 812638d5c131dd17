"""Capture a whole step as one CUDA graph: gather, augment, forward, loss, backward, update, metrics.

    recorder = CudaRecorder(device)
    step = GraphedStep(train_step, resident_loader, lr_at, recorder)
    for i, batch in enumerate(step.train(first, last), first):
        step(*batch, lr_at(i), i)

With a CUDA graph, a step costs the host one launch. On a CPU, testing/op_recorder.py has a recorder that replays a list
of operators. It is no faster, but it enforces the rules of a CUDA graph, so tests on any machine find code that breaks
them. Every replay does the same work on the same memory and uses the Python numbers of the recording. It must not
synchronise with the host, keep memory for the next replay, or use an autograd graph made before the replay.

Values that differ from step to step reach the graph through memory. The draws, learning rates and numbers of a block of
steps are copied to the device before the block's first step. Each replay reads the row that a counter on the device
points to, and increments the counter, so a block may end anywhere, for example at a run's last step.

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
NoBatch = tuple[()]  # stands for a batch that the graph makes itself


class CannotRecord(RuntimeError):
    """Raised by testing/op_recorder.py if a replay would differ from the work; CudaRecorder raises torch's errors."""


class Recording(Protocol):
    """Recorded work, such as a torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        """Run the work again, on the same memory."""


class Recorder(Protocol):
    """An object that records a device's operations once, to replay them later."""

    def record(self, work: Work, mutated: Sequence[Tensor]) -> Recording:
        """Record the device operations that `work` launches.

        `work` may run several times; the tensors in `mutated` have their old values afterwards.

        Args:
            work: runs the same operators at each call. Each replay writes the tensors that it creates to the same
                addresses.
            mutated: all tensors from outside that `work` writes to.

        Returns:
            The recording. The caller must keep all tensors alive that `work` uses.

        Raises:
            RuntimeError: if `work` cannot be recorded; testing/op_recorder.py raises CannotRecord.
        """


# ------------------------------------------------------------------------------------------- steps


class Batches(Protocol):
    """The batches of a captured step: see ResidentLoader."""

    compiles: bool  # batch() is bitwise identical when inductor compiles it

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
        columns: tensors (n, ...) by name, which define the shapes and dtypes of the table.
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

        `columns` has at most `rows` rows. The copy is queued on the current stream, so work that is already queued
        there still reads the previous rows. The host does not wait for it.
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
        # A list, because dynamo guards the keys of a dict by identity and would recompile for every run of a process.
        self._rates = list(step.learning_rates)
        self._table = DeviceTable(self._columns(range(0)), BLOCK_STEPS, step.engine.device)
        compiles = step.inner.compiled and batches.compiles
        self._next_batch = compiled(self.next_batch) if compiles else self.next_batch
        self._due: Iterator[int] = iter(())  # the steps of the block that have not run
        self.recording = recorder.record(self._work, [*step.mutated_tensors, *self._table.mutated_tensors])

    def train(self, first_step: int, last_step: int) -> Iterator[NoBatch]:
        """Yield an empty batch for each step of [first_step, last_step), as a loader yields batches."""
        rows = self._table.rows
        blocks = [range(i, min(i + rows, last_step)) for i in range(first_step, last_step, rows)]
        columns = self._columns(blocks[0]) if blocks else {}
        for block, following in itertools.zip_longest(blocks, blocks[1:]):
            self._table.fill(columns)
            self._due = iter(block)
            for i in block:
                yield ()
                # Draw the next block now, while the device still has queued steps to run.
                if following and i == block[len(block) // 2]:
                    columns = self._columns(following)

    def __call__(self, lr: float, step: int) -> None:
        """Run step `step`, which must be the next one of train(), at the learning rate lr_at(step).

        Raises:
            ValueError: if `step` or `lr` is not the one that train() prepared.
        """
        due = next(self._due, None)
        if step != due or lr != self.lr_at(step):
            raise ValueError(f"step {step} at learning rate {lr} is not the step that train() prepared: step {due}")
        self.recording.replay()

    def _columns(self, steps: range) -> Draws:
        """Return the draws, step numbers and learning rates, (steps, ...) each; the rates are rounded as by fill_()."""
        scales = self.step.learning_rates.values()
        rates = [[self.lr_at(i) * scale for scale in scales] for i in steps]
        return {
            **self.batches.draws(steps.start, steps.stop),
            "step": torch.tensor(steps, dtype=torch.int64),
            "rates": torch.tensor(rates, dtype=self.step.lr.dtype).reshape(len(steps), len(scales)),
        }

    def next_batch(self) -> Batch:
        """Set the learning rates and step number from the next row, and return its batch."""
        row = self._table.next_row()
        for tensor, rate in zip(self._rates, row["rates"].unbind(), strict=True):
            tensor.copy_(rate)
        self.step.metrics.step.copy_(row["step"])
        return self.batches.batch(row)

    def _work(self) -> None:
        images, labels = self._next_batch()
        # If the images require a gradient, pass a new leaf on the same memory at each step. A batch that outlives the
        # step (FixedBatch) would otherwise keep its gradient between replays.
        self.step.run_on_device(images.detach().requires_grad_(images.requires_grad), labels)


class GraphedEvaluation:
    """An evaluation captured for one batch and replayed for each batch.

    Pass the iterator that evaluate() returns to the same Evaluator that was captured.
    """

    def __init__(self, evaluate: Evaluator, batches: Evaluations, recorder: Recorder) -> None:
        self.evaluator, self.batches = evaluate, batches
        columns = batches.eval_draws()  # they are the same at every evaluation
        self._table = DeviceTable(columns, len(columns["index"]), evaluate.metrics.loss.device)
        self._table.fill(columns)
        self.recording = recorder.record(self._work, [*evaluate.metrics.tensors, *self._table.mutated_tensors])

    def evaluate(self) -> Iterator[NoBatch]:
        """Replay the evaluation for each batch of the split, and yield an empty batch after each replay."""
        self._table.rewind()
        for _ in range(self._table.rows):
            self.recording.replay()
            yield ()

    @torch.no_grad()
    def _work(self) -> None:
        self.evaluator.model.eval()
        row = self._table.next_row()
        self.evaluator.add(*self.batches.eval_batch(row["index"], row["count"]))


def capture_if_enabled(
    step: TrainStep,
    evaluate: Evaluator,
    training: Any,
    evaluation: Any,
    lr_at: Callable[[int], float],
    say: Callable[[str], None],
) -> tuple[Callable[..., None], Any, Any]:
    """Return step, training batches and evaluation batches, captured if the engine has CUDA graphs, else unchanged.

    If engine.cuda_graph is auto and the capture fails, they are also returned unchanged.

    Args:
        step: the step, already compiled if its engine compiles.
        evaluate: the evaluator of the curve.
        training: the training batches; a Batches if the engine has CUDA graphs.
        evaluation: the evaluation batches; an Evaluations if the engine has CUDA graphs.
        lr_at: returns the learning rate of a step, before it is scaled for a parameter group.
        say: receives the reason why auto does without a graph.

    Raises:
        RunError: if engine.cuda_graph is true and the capture fails.
    """
    engine = step.engine
    if not engine.cuda_graph:
        return step, training, evaluation
    try:
        recorder = CudaRecorder(engine.device)
        graphed = GraphedStep(step, training, lr_at, recorder)
        return graphed, graphed, GraphedEvaluation(evaluate, evaluation, recorder)
    except Exception as error:
        step.abort_step()
        why = first_line(error)
        if not engine.cuda_graph_may_fall_back:
            raise RunError(f"engine.cuda_graph true: the step cannot be captured ({why}); leave it at auto") from error
        say(f"cuda_graph: false (the step cannot be captured: {why})")
        return step, training, evaluation


# ------------------------------------------------------------------------------------------- on a GPU


class CudaRecorder:
    """Capture work as CUDA graphs. It has not yet run on a GPU.

    All graphs of a recorder share one memory pool, so that an evaluation needs no memory of its own. They may be
    replayed in any order, because each graph writes pooled memory before it reads it.
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
                # Capturing runs nothing, so no memory has to be restored. Its error mode stays "global", the strictest,
                # because no other thread uses the device meanwhile, except autograd's, which is part of the capture.
                with capturing(graph, pool=self.pool, stream=self.stream):
                    work()
        finally:  # also if the work fails: the step may then continue without a graph, from the restored state
            current.wait_stream(self.stream)
        return graph  # it does not keep the captured tensors alive


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """Capture the block with torch.cuda.graph while the garbage collector is paused.

    If the collector destroyed a graph of an earlier run in this process, it would end the capture (pytorch#195397). If
    the block raises, its own error is raised and not the one that ending the failed capture then raises.
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
