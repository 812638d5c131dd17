"""`fastres train`, or `torchrun -m fastres.train` for several processes: one run, from top to bottom.

config -> data -> model -> step -> schedule -> log, checkpoint
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

# These packages import their modules, and torch, when one of their names is used: after the command line is parsed.
from fastres import data, distributed, runs, training, utils
from fastres.config.cli import parse, train_parser
from fastres.utils import process, ranks
from fastres.utils.errors import printed_once_per_host, run_command
from fastres.utils.process import command_name
from fastres.utils.run_timer import RunTimer

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from torch import nn

    from fastres.config.schema import Config
    from fastres.data.sources.source import Source

LOG = logging.getLogger(process.RUN_LOG)


def parser() -> ArgumentParser:
    """Return the command line's parser."""
    return train_parser(command_name("train"))


def main(argv: list[str] | None = None) -> int:
    """Train the run that the command line describes, and return the exit status."""
    with process.console_log():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    with printed_once_per_host():
        config = parse(argv)
        if ranks.local_rank() > 0:
            training.resolve_engine(config)  # raises what local rank 0 raises
    engine = training.resolve_engine(config, ranks.local_rank())
    engine.apply_torch_settings()
    with (
        training.catch_signals() as stop,
        distributed.join_process_group(engine.device, config.run.timeout_s) as group,
    ):
        return train(config, engine, group, stop)


def train(
    config: Config,
    engine: training.Engine,
    group: distributed.ProcessGroup,
    stop: training.StopSignal,
    source: Source | None = None,
    network: nn.Module | None = None,
) -> int:
    """Run the training and return the exit status: 0, or 128 + N if signal N stopped it.

    Args:
        config: the run's configuration.
        engine: the resolved engine, whose torch settings are applied.
        group: the run's processes.
        stop: the signal that stops the run.
        source: replaces the configured source.
        network: replaces the configured network.
    """
    is_main = ranks.rank() == 0
    say, warn = (LOG.info, LOG.warning) if is_main else (_ignore, _ignore)
    config, source = training.fix_length(config, group, source, say=say)
    steps = config.train.steps
    run = runs.RunDir(config)
    if (summary := group.broadcast_from_rank0(run.check_resumable)) is not None:
        return _report_finished(run, summary)

    # ------------------------------------------------------------------------ data, model, step, schedule
    parts = training.build_parts(config, engine, group, source, network)
    step, evaluator, lr_at = parts.step, parts.evaluator, parts.lr_at
    run.data = group.broadcast_from_rank0(lambda: data.describe(config, parts.data.source))
    timer = RunTimer(engine.device.type)

    # ------------------------------------------------------------------------ resume
    # Restore a named checkpoint before acquiring the folder, so that a checkpoint that does not fit leaves no folder.
    named = runs.resume.load_named(config, run, group)
    position = runs.resume.restore(named, run, step, timer)
    with ExitStack() as stack:
        group.broadcast_from_rank0(run.acquire)
        stack.callback(run.release)
        if named is None:
            position = runs.resume.restore(runs.resume.load_latest(run, group), run, step, timer)
        start = position.step
        if start == 0 and not config.model.weights:
            training.fit_whitening(config, engine, parts)
        progress = stack.enter_context(utils.ProgressLine("step", steps, start, enabled=is_main))
        group.broadcast_from_rank0(lambda: run.begin(engine, start))
        log = runs.TrainingLog(config, run, parts, timer, progress, position, is_main=is_main)
        log.begin()

        # -------------------------------------------------------------------- compile, capture
        training.warm_up(parts, say=warn)
        # With CUDA graphs the batches are empty, because the graph makes its own.
        run_step, train_batches, curve_batches = training.capture_if_enabled(
            step, evaluator, parts.data.train_loader, parts.data.curve_loader, lr_at, say=warn
        )

        # -------------------------------------------------------------------- train
        timer.start()
        for i, batch in enumerate(group.with_heartbeat(train_batches.train(start, steps)), start):
            stop.saves = True  # until the first batch is here, a signal ends the process at once
            lr = lr_at(i)
            run_step(*batch, lr, i)
            done = i + 1
            stopping = group.max_over_ranks(stop.number) if training.polls_signals(done) else 0
            if not (log.line_due(done) or log.checkpoint_due(done) or stopping):
                continue
            with timer.paused():
                metrics = log.read_metrics()
                if log.line_due(done):
                    log.training(done, lr, metrics)
                if log.evaluation_due(done):
                    log.evaluation(done, lr, evaluator(group.with_heartbeat(curve_batches.evaluate())))
                if log.checkpoint_due(done) or stopping:
                    runs.resume.save(run, group, log.position(done), step, timer)
            if stopping:
                log.stopped(done, stopping)
                return 128 + stopping
        timer.stop()
        stop.nothing_to_save()

        # -------------------------------------------------------------------- result
        final = log.last_eval if log.final_is_known() else None
        final = final or evaluator(group.with_heartbeat(parts.data.test_loader.evaluate()))
        log.finish(final, captured=run_step is not step)
        return 0


def _report_finished(run: runs.RunDir, summary: dict[str, Any]) -> int:
    """Log on rank 0 that the run is finished already, and return exit status 0."""
    if ranks.rank() == 0:
        line = f"{run.folder} is finished: test accuracy {summary['test_accuracy']:.4f}; nothing to do"
        LOG.info("%s", f"{line} (another --run.dir begins a new run)", extra=process.RESULT)
    return 0


def _ignore(_: str) -> None:
    """Log nothing, on other ranks than rank 0."""


if __name__ == "__main__":
    run_command(main)
