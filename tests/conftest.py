"""One thread, here and in every process that a test starts, and one seed for every test."""

import os

# Before torch is imported. Bitwise equal sums need an equal number of threads, and nets as small as these gain nothing
# from more of them.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
