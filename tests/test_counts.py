"""The gate of bench/counts.py, run as in CI: an unchanged checkout passes, and a slower one fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import counts
from tests.commands import users_environment

CHECKOUT = Path(__file__).parent.parent
TORCH = ".".join(torch.__version__.split(".")[:2])


class Checkout:
    """A copy of this checkout that a test can edit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        caches = shutil.ignore_patterns("__pycache__")
        for folder_name, name in (("fastres", "fastres"), ("kernels", "fastres_kernels"), ("bench", "bench")):
            shutil.copytree(CHECKOUT / folder_name, folder / name, ignore=caches)
        # The counts are those of the copy, not of the installed package.
        find = "from importlib.util import find_spec as f; print(f('fastres').origin, f('fastres_kernels').origin)"
        found = self.run("-c", find).stdout.split()
        assert [Path(path).parent.parent for path in found] == [folder, folder]

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args],
            cwd=self.folder,
            env=users_environment({"PYTHONPATH": str(self.folder)}),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def count(self, groups: str, act: str = "--check") -> subprocess.CompletedProcess[str]:
        return self.run("-m", "bench.counts", act, "--only", groups)

    @property
    def expected(self) -> Path:
        return self.folder / "bench" / "expected_counts.json"

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"{file} has changed: edit it elsewhere"
        (self.folder / file).write_text(text.replace(old, new))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


@pytest.mark.slow
def test_this_checkout_passes_and_a_decrease_is_reported_and_recorded(checkout: Checkout) -> None:
    expected = json.loads(checkout.expected.read_text())
    expected["every torch"]["graph"]["breaks"] += 1
    checkout.expected.write_text(json.dumps(expected))
    done = checkout.count("operators,host,graph")
    assert done.returncode == 0, done.stderr
    write = "python -m bench.counts --only graph --write"
    assert f"good news: graph: breaks fell from 1 to 0; to keep it: {write}" in done.stdout.splitlines()
    assert ("not compared: operators, for" in done.stdout) == (TORCH not in expected)

    assert checkout.run(*write.split()[1:]).returncode == 0
    assert checkout.expected.read_bytes() == (CHECKOUT / "bench" / "expected_counts.json").read_bytes()


def test_a_count_that_rises_appears_or_disappears_fails_and_one_that_falls_is_good_news() -> None:
    counted = {"host": {name: counts.Count(2, "at step.py") for name in ("same", "more", "fewer", "new")}}
    expected = {counts.EVERY_TORCH: {"host": {"same": 2, "more": 1, "fewer": 3, "old": 0}}}
    wrong, notes = counts.judge(counted, expected)
    assert [line.partition(";")[0] for line in wrong] == [
        "host: more rose from 1 to 2 (at step.py)",
        "host: new is 2 and not in bench/expected_counts.json",
        "host: old is in bench/expected_counts.json and no longer counted",
    ]
    assert [line.partition(";")[0] for line in notes] == ["good news: host: fewer fell from 3 to 2"]


def test_counts_of_another_torch_are_not_compared() -> None:
    wrong, notes = counts.judge({"operators": {"forward": counts.Count(9)}}, {"1.0": {"operators": {"forward": 1}}})
    assert wrong == [] and notes[0].startswith("not compared: operators, because ")


# A change that somebody might make, the group that detects it, and how its line begins.
REGRESSIONS = {
    "the host reads the loss of every step": (
        (
            "fastres/training/step.py",
            "self.add_to_metrics(loss.detach()",
            "float(loss); self.add_to_metrics(loss.detach()",
        ),
        "host",
        "host: training step, bf16, synchronisations rose from 0 to 1 "
        "(aten._local_scalar_dense.default at fastres/training/step.py:",
    ),
    "the host prints it": (
        (
            "fastres/training/step.py",
            "self.add_to_metrics(loss.detach()",
            "print(loss); self.add_to_metrics(loss.detach()",
        ),
        "host",
        "host: training step, bf16, synchronisations rose from 0 to 1 (__repr__ at fastres/training/step.py:",
    ),
    "the step has an operator more": (
        ("fastres/training/step.py", "mean_loss * samples", "mean_loss.mul(1) * samples"),
        "operators",
        "operators: training step, the rest rose from ",
    ),
    "the loader moves every batch": (
        (
            "fastres/data/loaders/resident.py",
            "yield from zip(images.split(b), torch.cat(labels).split(b), strict=True)",
            "yield from zip((i.to(self.spec.device) for i in images.split(b)), torch.cat(labels).split(b))",
        ),
        "host",
        "host: resident loader, later steps of it, copies rose from 0 to 15 (to at fastres/data/loaders/resident.py:",
    ),
    "the graph breaks": (
        (
            "fastres/training/step.py",
            "            loss = F.cross_entropy(logits, target, label",
            "            print(logits)\n            loss = F.cross_entropy(logits, target, label",
        ),
        "graph",
        "graph: breaks rose from 0 to ",
    ),
    "the graph has the learning rate as a constant": (
        ("fastres/training/step.py", "tensor.fill_(lr * scale)", "self.forward_loss.label_smoothing = lr"),
        "graph",
        "graph: recompilations rose from 0 to 3 ",
    ),
    "activations lose channels-last": (
        ("fastres/models/blocks.py", "    y = norm(x)\n", "    y = norm(x.contiguous())\n"),
        "network",
        "network: torch, backward, launches rose from ",
    ),
}


@pytest.mark.parametrize("what", REGRESSIONS)
@pytest.mark.slow
def test_a_regression_fails_the_check_in_a_line_that_names_it(checkout: Checkout, what: str) -> None:
    (file, old, new), group, start = REGRESSIONS[what]
    if group == "network":
        pytest.importorskip("triton", reason="it is what compiles")
    if TORCH not in json.loads(checkout.expected.read_text()):
        assert checkout.count(group, "--write").returncode == 0
    checkout.replace(file, old, new)
    done = checkout.count(group)
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith(start))
    assert f"; to accept it: python -m bench.counts --only {group} --write, and commit " in line
