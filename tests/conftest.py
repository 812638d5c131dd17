"""One thread, here and in every process that a test starts; Triton's interpreter here; one seed for every test."""

import os

# Before torch is imported. Bitwise equal sums need an equal number of threads, and nets as small as these gain nothing
# from more of them.
os.environ["OMP_NUM_THREADS"] = "1"
# Before Triton is imported, so that kernels run without a GPU. Commands that tests start run without it, as users' do.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
