"""A small soak: CI kills a few runs; `python -m tests.soak` kills hundreds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastres.runs import checkpoint
from fastres.utils.atomic_io import write_text
from tests.commands import users_environment
from tests.soak import FLAGS, Lost, Undisturbed

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="it looks at /proc")


@pytest.mark.slow
def test_a_few_kills_lose_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--kills", "6", "--jobs", "2", "--seed", "5"],
        capture_output=True, text=True, env=users_environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills of" in done.stdout and "lost or corrupt: 0" in done.stdout


def test_the_soak_detects_lost_and_damaged_files(tmp_path: Path) -> None:
    from fastres.train import main

    run = tmp_path / "run"
    assert main([*FLAGS, "--run.checkpoint_every", "1", "--run.dir", str(run)]) == 0
    undisturbed = Undisturbed(run)
    assert undisturbed.compare(run, 1) == 24
    newest = checkpoint.found(run / "checkpoints")[0]
    lines = (run / "metrics.jsonl").read_text()
    for path, damaged in (
        (newest, newest.read_bytes()[:-9]),
        (run / "metrics.jsonl", lines.replace('"step": 7', '"step": 8').encode()),
        (run / "metrics.jsonl", lines.replace(lines.splitlines()[3], "{").encode()),
        (run / "summary.json", b""),
        (run / "history.csv", b""),
        (run / "config.yaml", (run / "config.yaml").read_bytes()[:100]),
        (run / "model.safetensors", b"other weights"),
        (run / "history.png", (run / "history.png").read_bytes()[:-1]),
    ):
        whole = path.read_bytes()
        path.write_bytes(damaged)
        with pytest.raises(Lost):
            undisturbed.compare(run, 1)
        path.write_bytes(whole)
    for path in checkpoint.found(run / "checkpoints"):
        path.unlink()
    with pytest.raises(Lost, match="step 24 was logged, and the newest checkpoint is of step 0"):
        undisturbed.compare(run, 1)
    write_text(run / "metrics.jsonl", "")
    assert undisturbed.compare(run, 1) == 0
