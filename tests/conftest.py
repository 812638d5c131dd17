"""Set up every test: one thread, no GPU, Triton's interpreter, one seed, a separate cache, the longest files first.

Processes that a test starts inherit the thread count, the hidden GPU and the cache, but not the interpreter.
"""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Bitwise equal sums need an equal number of threads, and nets as small as these gain nothing
# from more of them.
os.environ["OMP_NUM_THREADS"] = "1"
# Expected values are a CPU's, also on a machine with a GPU. test_kernels_gpu.py restores the GPU, also under xdist.
os.environ.setdefault("FASTRES_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Set before Triton is imported, so that kernels run without a GPU. Commands that tests start unset it.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

# These files take minutes each. pytest-xdist would start with the files of the most tests, and one of these would end
# up last on one worker.
LONGEST = (
    "test_distributed",
    "test_kernels_bn",
    "test_train",
    "test_counts",
    "test_cuda_graph",
    "test_models",
    "test_bench",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # turn off pytest-xdist's order by the number of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put decoded images into a folder of the tests' own, in the processes that they start too."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # A pytest that a test starts is not an xdist worker; in a worker, pytest-benchmark measures nothing.
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        # matplotlib's list of fonts stays in the user's cache, because building it takes seconds.
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(users / "matplotlib")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
