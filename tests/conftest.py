"""One thread and no GPU, here and in every process that a test starts; Triton's interpreter here; one seed for every
test; a cache of the tests' own; and the longest files first."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Bitwise equal sums need an equal number of threads, and nets as small as these gain nothing
# from more of them.
os.environ["OMP_NUM_THREADS"] = "1"
# What the tests expect is a CPU's, on a machine with a GPU too. test_kernels_gpu.py has it back, from a worker as well.
os.environ.setdefault("FASTRES_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Before Triton is imported, so that kernels run without a GPU. Commands that tests start run without it, as users' do.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

# Minutes each. pytest-xdist would begin with the files of the most tests, and one worker be left with one of these.
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
    config.option.loadscopereorder = False  # pytest-xdist's order, by the number of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put decoded images into a folder of the tests' own, in the processes that they start too."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # A pytest that a test starts is nobody's worker: pytest-benchmark measures nothing in one.
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        # But matplotlib's list of fonts, which takes seconds to make, stays where it is.
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(users / "matplotlib")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
