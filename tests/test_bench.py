"""bench/bench_kernels.py runs without a GPU, and makes of a GPU's rows the lines that tables.py wants."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.commands import users_environment

CHECKOUT = Path(__file__).parent.parent
NUMBERS = ("median_us", "baseline_median_us", "ratio", "copy_gb_per_s", "n")
LISTS = ("us", "us_20_80", "baseline_us", "baseline_us_20_80")
ONLY_ON_A_GPU = ("capability", "gb_per_s", "share_of_copy")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(CHECKOUT / "bench")
    return importlib.import_module("bench_kernels")


def test_the_benchmark_runs_on_a_cpu_and_claims_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "bench/bench_kernels.py", "-q", "--benchmark-only"),
            *("-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'rows.json'}"),
        ],
        cwd=CHECKOUT,
        env=users_environment({"CUDA_VISIBLE_DEVICES": ""}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the reference and not the kernels: it claims nothing" in done.stdout
    assert "FASTEST" not in done.stdout
    rows = [row["extra_info"] for row in json.loads((tmp_path / "rows.json").read_text())["benchmarks"]]
    for row in rows:
        assert all(row[name] > 0 for name in NUMBERS)
        assert all(time > 0 for name in LISTS for time in row[name])
        assert len(row["us"]) == len(row["baseline_us"]) == row["n"]
        assert all(row[name] is None for name in ONLY_ON_A_GPU)
        assert (row["dtype"], row["mode"], row["baseline"], row["absent"]) == ("fp32", "plain", "eager", {})
        assert row["device"]
    contests = groupby(rows, lambda row: (row["what"], row["shape"], row["direction"]))
    directions: dict[str, set[str]] = {}
    for (what, _, direction), contest in contests:  # of neighbouring rows: the variants have one shape
        assert [row["variant"] for row in contest] == ["reference", "eager"]
        directions.setdefault(what, set()).add(direction)
    layers, blocks = {"forward", "backward", "full"}, {"full"}
    assert directions == {
        "bn_relu": layers,
        "bn_add_relu": layers,
        "basic_blocks": blocks,
        "bottlenecks": blocks,
    }


def row(variant: str, us: float, baseline_us: float, **changes: Any) -> dict[str, Any]:
    """As a GPU would record it: ±1 % around the times."""
    return {
        "device": "a GPU",
        "capability": [9, 0],
        "what": "bn_relu",
        "shape": [128, 16, 32, 32],
        "dtype": "bf16",
        "direction": "full",
        "mode": "graph",
        "variant": variant,
        "baseline": "inductor",
        "median_us": us,
        "us_20_80": [0.99 * us, 1.01 * us],
        "baseline_median_us": baseline_us,
        "baseline_us_20_80": [0.99 * baseline_us, 1.01 * baseline_us],
        "ratio": baseline_us / us,
        "gb_per_s": 1234.0,
        "copy_gb_per_s": 2468.0,
        "share_of_copy": 0.5,
        "n": 20,
        "absent": {"apex": "NVIDIA's apex is not installed"},
    } | changes


def test_the_lines_of_a_gpu(kernels: Any) -> None:
    lines = kernels.summary(
        [
            row("two_pass", 20.0, 30.0),
            row("inductor", 30.0, 30.0, gb_per_s=None, share_of_copy=None),
            row("two_pass", 1000.0, 1500.0, what="bottlenecks", shape=[256, 256, 56, 56]),
        ]
    )
    assert lines == [
        "a GPU: a copy moves 2,468 GB/s",
        "bn_relu, 128 × 16 × 32 × 32 in bf16",
        "  full, graph     two_pass         20.0 us (19.8 to 20.2)          1.50 x inductor's 30.0, n=20"
        ", 1,234 GB/s, 50% of a copy's",
        "  full, graph     inductor         30.0 us (29.7 to 30.3)          1.00 x inductor's 30.0, n=20",
        "bottlenecks, 256 × 256 × 56 × 56 in bf16",
        "  full, graph     two_pass      1,000.0 us (990.0 to 1,010.0)      1.50 x inductor's 1,500.0, n=20"
        ", 1,234 GB/s, 50% of a copy's",
        "no apex: NVIDIA's apex is not installed",
        "for FASTEST in fastres_kernels/tables.py:",
        "    (9, 0): {",
        '        (131072, 16, False): "two_pass",',
        "    },",
    ]


def test_fastest_is_what_beat_inductor_beyond_the_spread_forward_and_backward_in_a_graph(
    kernels: Any,
) -> None:
    small, large = [128, 64, 8, 8], [256, 64, 112, 112]
    rows = [
        row("two_pass", 20.0, 30.0),
        row("cooperative", 15.0, 30.0),  # the better of two that won
        row("two_pass", 20.0, 30.0, what="bn_add_relu"),
        row("cooperative", 25.0, 30.0, what="bn_add_relu"),
        row("eager", 5.0, 30.0, shape=large),  # not ours to name
        row("two_pass", 29.5, 30.0, shape=large),  # within the spread
        row("two_pass", 20.0, 30.0, shape=large, direction="forward"),
        row("two_pass", 20.0, 30.0, shape=large, mode="plain"),
        row("two_pass", 20.0, 30.0, shape=large, dtype="fp16"),
        row("two_pass", 20.0, 30.0, shape=large, what="basic_blocks"),
        row("cooperative", 40.0, 30.0, shape=small),  # lost
        row("two_pass", 20.0, 30.0, shape=small),
    ]
    assert kernels.fastest_lines(rows)[1:] == [
        "    (9, 0): {",
        '        (131072, 16, False): "cooperative",',
        '        (131072, 16, True): "two_pass",',
        '        (8192, 64, False): "two_pass",',
        "    },",
    ]


def test_bytes_of_a_cooperative_kernel_are_two_pass_where_it_does_not_fit(kernels: Any) -> None:
    h100 = 132  # multiprocessors
    large, small = (kernels.Case("bn_add_relu", (128, c, s, s), "bf16") for c, s in ((16, 32), (64, 8)))
    assert kernels.bytes_per_element(small, "two_pass", "full", h100) == 8.125 + 14.125
    assert kernels.bytes_per_element(small, "cooperative", "full", h100) == 6.125 + 10.125
    assert kernels.bytes_per_element(large, "cooperative", "full", h100) == 6.125 + 14.125
    assert kernels.bytes_per_element(small, "apex", "full", h100) is None
