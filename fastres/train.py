"""`torchrun -m fastres.train`: one run, from top to bottom.

config -> data -> model -> step -> schedule -> log, checkpoint
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fastres.config.cli import parse
from fastres.config.schema import Config, model_options
from fastres.data.loaders.build import build_loader, classes_of, image_size, sample_images
from fastres.data.sources.source import Source, hold_out, load_source
from fastres.distributed import process_group, watchdog
from fastres.models.registry import build_model, check_input_shape
from fastres.models.weights import load_weights, save_weights
from fastres.runs import checkpoint
from fastres.runs.environment import device_name
from fastres.runs.run_dir import Run, write_text
from fastres.training.cuda_graph import recorded
from fastres.training.engine import Engine, resolve
from fastres.training.optim import build_optimizer
from fastres.training.schedule import lr_scale
from fastres.training.step import Batch, Evaluator, Metrics, TrainStep, check_channels_last, warm_up
from fastres.utils import ranks
from fastres.utils.errors import RunError, UsageError, first_line, run_command
from fastres.utils.progress import ProgressLine
from fastres.utils.run_timer import Clock

SIGNAL_EVERY = 10  # steps between agreements on a signal, where there are several processes
GRACE_S = 10.0  # after a signal: time to finish the step and save


def main(argv: list[str] | None = None) -> int:
    """Trains what the command line asks for. Returns the exit status."""
    config = parse(sys.argv[1:] if argv is None else argv)
    engine = resolve(config, ranks.local_rank())
    process_group.check_batch(config.train.batch_size, config.train.accumulate)
    with stop_on_signal() as stop, process_group.group(engine.device, config.run.timeout_s):
        return train(config, engine, stop)


def train(config: Config, engine: Engine, stop: list[int], source: Source | None = None) -> int:
    """The run. `stop` holds the number of a signal once one has come; `source` stands in for the configured one."""
    is_main = ranks.rank() == 0
    steps, batch_size = config.train.steps, config.train.batch_size

    # ------------------------------------------------------------------------------------- folder
    run = Run(config)
    if (summary := process_group.broadcast_from_rank0(run.examine)) is not None:
        if is_main:
            print(f"{run.folder} is finished: test accuracy {summary['test_accuracy']:.4f}; nothing to do")
        return 0

    # ------------------------------------------------------------------------------------- data
    source = source or process_group.rank0_first(lambda: load_source(config.data))
    training, held_out, curve_split = source.train, source.test, "test"
    if config.data.validation:
        training, held_out = hold_out(source.train, config.data.validation)
        curve_split = "validation"

    def loader_of(split: Any) -> Any:
        place = {"rank": ranks.rank(), "world_size": ranks.world_size()}
        return build_loader(config, source, split, device=engine.device, dtype=engine.dtype, **place)

    train_loader, curve_loader = loader_of(training), loader_of(held_out)
    test_loader = loader_of(source.test) if config.data.validation else curve_loader

    # ------------------------------------------------------------------------------------- model
    torch.manual_seed(config.run.seed)
    model = build_model(
        config.model.name,
        num_classes=classes_of(config, source),
        in_channels=source.channels,
        norm=engine.norm,
        **model_options(config.model),
    )
    model = engine.place(model)
    replaced: list[str] = []
    if config.model.weights:  # the parameters reach the other processes as DDP goes around them
        replaced = process_group.broadcast_from_rank0(lambda: load_weights(model, str(config.model.weights)))
    process_group.broadcast_buffers(model)
    if config.model.sync_norm:
        process_group.enable_sync_batchnorm(model)
    blank = dummy_batch(config, source, engine)
    at_once = len(blank[0]) // config.train.accumulate * (ranks.world_size() if config.model.sync_norm else 1)
    check_input_shape(
        config.model.name, (at_once, *blank[0].shape[1:]), training=True, **model_options(config.model)
    )
    warnings = []
    if engine.channels_last:
        try:
            check_channels_last(model, engine, blank)
        except AssertionError as error:  # slower, not wrong: said, not fatal
            warnings.append(f"channels_last is lost: {error}")

    # ------------------------------------------------------------------------------------- step
    peak_lr = config.optim.lr * (ranks.world_size() if config.optim.scale_lr else 1)
    step = TrainStep(
        model,
        engine,
        lambda m, lr: build_optimizer(m, config.optim, lr),
        config.train.label_smoothing,
        config.train.accumulate,
    )
    evaluate = Evaluator(model, engine, config.train.eval_mirrored)

    def lr_at(i: int) -> float:
        return peak_lr * lr_scale(config.schedule, i, steps)

    # ------------------------------------------------------------------------------------- resume
    clock = Clock(engine.device.type)

    def restored(state: checkpoint.State | None) -> tuple[int, Metrics]:
        """The steps that are done, and what they summed to since the last evaluation."""
        if state is None:
            return 0, Metrics()
        try:
            step.load_state_dict(state["trainer"])
            clock.load_state_dict(state["clock"])
            start, window = state["step"], Metrics(**state["window"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"the checkpoint is of another model: {first_line(error)}") from None
        if start > steps:
            raise UsageError(f"the checkpoint is of step {start:,}, beyond train.steps {steps:,}")
        return start, window

    named = config.run.resume not in ("auto", "never")
    if named and ranks.restarted():  # it was continued from there, and has gone on since
        named = not process_group.broadcast_from_rank0(lambda: checkpoint.found(run.checkpoints))
    if named:  # before the folder is taken: what does not fit leaves nothing behind
        start, window = restored(
            process_group.broadcast_from_rank0(lambda: checkpoint.load(Path(config.run.resume)))
        )

    with ExitStack() as stack:
        process_group.broadcast_from_rank0(run.claim)
        stack.callback(run.release)
        if not named:
            start, window = restored(
                process_group.broadcast_from_rank0(lambda: checkpoint.latest(run.checkpoints))
            )
        if start == 0 and not config.model.weights and (whiten := getattr(model, "whiten", None)):
            whiten(sample_images(config, source, training).to(engine.device))
            process_group.broadcast_buffers(model)
        progress = stack.enter_context(ProgressLine("step", steps, start, enabled=is_main))
        process_group.broadcast_from_rank0(lambda: run.begin(engine, start))
        for line in (*engine.reasons, *source.notes, *warnings):
            progress.say(line)
        if replaced:
            progress.say(f"weights: head replaced ({', '.join(replaced)})")
        parameters = sum(p.numel() for p in model.parameters())
        progress.say(
            f"{config.model.name}, {parameters:,} parameters, {source.name}: {len(training):,} training images, "
            f"{steps:,} steps of {batch_size} on {device_name(engine.device)} in {engine.precision}, {run.folder}"
            + (f", continued at step {start:,}" if start else "")
        )

        # --------------------------------------------------------------------------------- warm-up
        warm_up(step, evaluate, blank, curve_loader, say=progress.say)
        # As CUDA graphs, where the engine has them: then a batch is empty, and made inside of the step.
        take, train_loader, curve_loader = recorded(
            step, evaluate, train_loader, curve_loader, lr_at, say=progress.say
        )

        # --------------------------------------------------------------------------------- training
        def save(done: int) -> None:
            """Collective: the state of `done` steps to disk."""
            process_group.assert_replicas_equal(model)
            trainer = step.state_dict()
            watchdog.beat("saves a checkpoint")
            if is_main:
                state = {
                    "step": done,
                    "window": asdict(window),
                    "clock": clock.state_dict(),
                    "trainer": trainer,
                }
                checkpoint.save(run.checkpoints, done, state, config.run.keep_checkpoints)

        def due(done: int, every: int) -> bool:
            return done % every == 0 or done == steps

        held = None  # the last evaluation
        logged, logged_s = start, clock.train_time_s  # the step and the time that were logged last
        clock.start()
        for i, batch in enumerate(watched(train_loader.train(start, steps)), start):
            lr = lr_at(i)
            take(*batch, lr, i)
            done = i + 1

            evaluates, saves = due(done, config.train.eval_every), due(done, config.run.checkpoint_every)
            logs = evaluates or due(done, config.train.log_every)
            stopping = process_group.max_over_ranks(stop[0]) if agrees(done) else 0
            if not (logs or saves or stopping):
                continue
            with clock.paused():
                totals, bad_step = step.totals.read()
                if bad_step >= 0:
                    raise RunError(
                        f"the loss became non-finite at step {bad_step:,}; {run.kept()}; "
                        "try a smaller --optim.lr or --engine.precision fp32"
                    )
                if logs:
                    step.totals.reset()
                    window += totals
                    speed = (done - logged) * batch_size / max(clock.train_time_s - logged_s, 1e-9)
                    logged, logged_s = done, clock.train_time_s
                    progress.update(
                        done,
                        f"loss {totals.mean_loss:.4f}  accuracy {totals.accuracy:.2%}  lr {lr:.4g}  "
                        f"{speed:,.0f} images/s",
                    )
                    if is_main:
                        run.log(
                            {"step": done, "split": "train", "loss": totals.mean_loss, "accuracy": totals.accuracy,
                             "lr": lr, "images_per_s": speed, "train_time_s": clock.train_time_s}
                        )  # fmt: skip
                if evaluates:
                    held = evaluate(watched(curve_loader.evaluate()))
                    progress.say(
                        f"step {done:,}: {curve_split} loss {held.mean_loss:.4f}, accuracy {held.accuracy:.2%}"
                    )
                    if is_main:
                        run.log(
                            {"step": done, "split": curve_split, "loss": held.mean_loss, "accuracy": held.accuracy,
                             "train_loss": window.mean_loss, "train_accuracy": window.accuracy,
                             "lr": lr, "train_time_s": clock.train_time_s}
                        )  # fmt: skip
                    window = Metrics()
                if saves or stopping:
                    save(done)
            if stopping and done < steps:
                if is_main:
                    run.write_history()
                    progress.say(f"stopped by {signal.Signals(stopping).name} at step {done:,}; {run.kept()}")
                return 128 + stopping
        clock.stop()

        # --------------------------------------------------------------------------------- results
        final = (
            held if held is not None and curve_split == "test" else evaluate(watched(test_loader.evaluate()))
        )
        if is_main:
            with run.writing():
                save_weights(model, run.folder / "model.safetensors")
                run.write_history()
                curve = run.evaluations()
                at_90 = next((row for row in curve if row["accuracy"] >= 0.9), None)
                summary = {
                    "recipe": config.recipe,
                    "model": config.model.name,
                    "data": source.name,
                    "test_accuracy": final.accuracy,
                    "test_loss": final.mean_loss,
                    "test_samples": final.samples,
                    "test_views": 1 + config.train.eval_mirrored,  # of an image, whose logits are averaged
                    "steps": steps,
                    "parameters": parameters,
                    "images_per_s": steps * batch_size / clock.train_time_s if steps else None,
                    "train_time_s": clock.train_time_s,
                    "wall_time_s": clock.wall_time_s,
                    "final_evaluation_s": evaluate.time_s,
                    "first_step_at_90": at_90 and at_90["step"],
                    "first_train_time_s_at_90": at_90 and at_90["train_time_s"],
                    "curve": curve_split,
                    "device": device_name(engine.device),
                    "precision": engine.precision,
                    "compile": step.inner.compiled,
                    "cuda_graph": take is not step,
                    "seed": config.run.seed,
                }
                write_text(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            progress.say(
                f"test accuracy {final.accuracy:.4f}, loss {final.mean_loss:.4f}, after {steps:,} steps in "
                f"{clock.train_time_s:.1f} s of training; curves: {run.folder / 'history.png'}"
            )
        return 0


# --------------------------------------------------------------------------------------------- details


def watched(batches: Any) -> Iterator[Any]:
    """The batches, with a word to the watch at each. Data that turns out bad once training has begun ends the run as
    failed, not as refused."""
    try:
        with closing(batches):
            while True:
                watchdog.beat("waits for its data")
                batch = next(batches, None)
                watchdog.beat()
                if batch is None:
                    return
                yield batch
    except UsageError as error:
        raise RunError(str(error)) from None


def dummy_batch(config: Config, source: Source, engine: Engine) -> Batch:
    """Zeros of the shapes, types and strides of this process's share of a batch."""
    n, side = config.train.batch_size // ranks.world_size(), image_size(config, source)
    shape = (n, source.channels, side, side)
    images = torch.empty(shape, dtype=engine.dtype, device=engine.device, memory_format=engine.memory_format)
    labels = torch.zeros(n, dtype=torch.int64, device=engine.device)
    if config.data.mixup or config.data.cutmix:
        labels = torch.zeros(n, classes_of(config, source), device=engine.device)
    return images.zero_(), labels


def agrees(done: int) -> bool:
    """Whether the processes compare their signals after this step: always where there is one process."""
    return ranks.world_size() == 1 or done % SIGNAL_EVERY == 0


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A box that holds 0, and the signal's number once SIGTERM or SIGINT has come.

    One more within GRACE_S changes nothing: at Ctrl-C the terminal and torchrun both send theirs. Later it ends the
    process at once.
    """
    stop, since = [0], [0.0]

    def remember(number: int, _: FrameType | None) -> None:
        if stop[0] and time.monotonic() - since[0] > GRACE_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not stop[0]:
            stop[0], since[0] = number, time.monotonic()

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_command(main)
