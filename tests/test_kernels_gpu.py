"""Run the Triton kernels on a GPU, if there is one, and the same checks in the interpreter.

The other tests run the kernels in the interpreter. It runs CTAs one after another, so barriers, stale caches and races
cannot occur there.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.commands import run_module

# conftest.py hides the GPUs from the tests' own process.
GPUS = os.environ["FASTRES_TESTS_GPUS"]
HAS_GPU = GPUS != "" and any(Path("/dev").glob("nvidia[0-9]*"))


def check_on(device: str, repeats: int, **env: str | None) -> subprocess.CompletedProcess[str]:
    checkout = Path(__file__).parent.parent
    return run_module("tests.kernels_on_device", device, repeats, cwd=checkout, env=env, timeout_s=900, fresh=True)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_kernels_on_a_gpu_are_right_and_bitwise_repeatable() -> None:
    done = check_on("cuda", 200, CUDA_VISIBLE_DEVICES=None if GPUS == "all" else GPUS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_same_checks_pass_in_the_interpreter() -> None:
    done = check_on("cpu", 1, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [line.split()[0] for line in done.stdout.splitlines()]
    assert kinds == ["norms"] * 6 + ["blocks", "convolutions", "integers"]
