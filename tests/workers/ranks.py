"""Functions for the ranks of a process group in tests/test_distributed.py: `torchrun -m tests.workers.ranks FUNCTION`.

Several ranks print to the same output, so each line is written in one piece.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

from fastres.distributed.process_group import assert_replicas_equal, join_process_group
from fastres.training.metrics import DeviceMetrics
from fastres.utils.errors import run_command
from fastres.utils.ranks import rank

CPU = torch.device("cpu")


def say(line: str) -> None:
    """Print a line in one write."""
    print(f"{line}\n", end="", flush=True)


def wait_for_data_on_rank_1() -> None:
    """Send no heartbeat for a minute, after rank 1 has reported that it waits for its data."""
    with join_process_group(CPU, timeout_s=2) as group:
        group.watchdog.heartbeat("computes" if rank() == 0 else "waits for its data")
        time.sleep(60)


def find_a_bad_loss_on_rank_1() -> None:
    """Count six steps with a loss that is not finite on rank 1 from step 4 on, and print the first bad step."""
    with join_process_group(CPU):
        metrics = DeviceMetrics(CPU)
        for step in range(6):
            bad = rank() == 1 and step >= 4
            metrics.step.fill_(step)
            metrics.add(torch.tensor(float("nan") if bad else 1.0), torch.tensor(1), 2)
        say(f"first bad step {metrics.read()[1]}")
    os._exit(0)


def compare_weights_that_drift_apart() -> None:
    """Compare the replicas, move a weight of rank 1 a little, and compare them again."""
    with join_process_group(CPU):
        model = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        assert_replicas_equal(model)
        say("equal")
        with torch.no_grad():
            model.bias[0] += rank() * 1e-7
        assert_replicas_equal(model)


FUNCTIONS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (wait_for_data_on_rank_1, find_a_bad_loss_on_rank_1, compare_weights_that_drift_apart)
}

if __name__ == "__main__":
    run_command(FUNCTIONS[sys.argv[1]])
