"""bench/bench_kernels.py runs without a GPU and turns a GPU's rows into the kernels' table; the suite's report."""

from __future__ import annotations

import json
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from bench import bench_kernels, report
from bench.lib.stats import p_value
from bench.lib.tables import Row, consumer_rate, kernel_lines
from fastres_kernels.batchnorm import dispatch_table
from tests.commands import run_module

CHECKOUT = Path(__file__).parent.parent
NUMBERS = ("median_us", "baseline_median_us", "ratio", "copy_gb_per_s", "n")
LISTS = ("us", "us_20_80", "baseline_us", "baseline_us_20_80")
ONLY_ON_A_GPU = ("capability", "gb_per_s", "share_of_copy")


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu_and_claims_nothing(tmp_path: Path) -> None:
    done = pytest_bench(
        "bench/bench_kernels.py",
        f"--benchmark-json={tmp_path / 'rows.json'}",
        f"--benchmark-storage={(tmp_path / 'kept').as_uri()}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "has no Triton: 'reference' is the plain PyTorch version of the kernels, no claim" in done.stdout
    assert "kernels/batchnorm/fastest.json" not in done.stdout
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
    for (what, _, direction), contest in contests:  # neighbouring rows are variants of one shape
        assert [row["variant"] for row in contest] == ["reference", "eager"]
        directions.setdefault(what, set()).add(direction)
    layers, blocks = {"forward", "backward", "full"}, {"full"}
    assert directions == {"bn_relu": layers, "bn_add_relu": layers, "basic_blocks": blocks, "bottlenecks": blocks}


def row(variant: str, us: float, baseline_us: float, **changes: Any) -> dict[str, Any]:
    """Return a row as a GPU would record it, with a spread of ±1 % around the times."""
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


def test_rows_of_a_gpu_are_printed_with_spread_ratio_and_bandwidth() -> None:
    infos = (
        row("two_pass", 20.0, 30.0),
        row("inductor", 30.0, 30.0, gb_per_s=None, share_of_copy=None),
        row("two_pass", 1000.0, 1500.0, what="bottlenecks", shape=[256, 256, 56, 56]),
    )
    assert kernel_lines([Row("bench/bench_kernels.py::bench_kernels", info) for info in infos]) == [
        "a GPU: a copy moves 2,468 GB/s",
        "bn_relu, 128 × 16 × 32 × 32 in bf16",
        "  full, graph     two_pass         20.0 us (19.8 to 20.2)          1.50 x inductor's 30.0, n=20"
        ", 1,234 GB/s, 50% of a copy's",
        "  full, graph     inductor         30.0 us (29.7 to 30.3)          1.00 x inductor's 30.0, n=20",
        "bottlenecks, 256 × 256 × 56 × 56 in bf16",
        "  full, graph     two_pass      1,000.0 us (990.0 to 1,010.0)      1.50 x inductor's 1,500.0, n=20"
        ", 1,234 GB/s, 50% of a copy's",
        "no apex: NVIDIA's apex is not installed",
    ]


def test_the_fastest_variant_beats_inductor_beyond_the_spread_forward_and_backward_in_a_graph() -> None:
    small, large = [128, 64, 8, 8], [256, 64, 112, 112]
    rows = [
        row("two_pass", 20.0, 30.0),
        row("cooperative", 15.0, 30.0),  # the better of two that won
        row("two_pass", 20.0, 30.0, what="bn_add_relu"),
        row("cooperative", 25.0, 30.0, what="bn_add_relu"),
        row("eager", 5.0, 30.0, shape=large),  # not one of this project's variants
        row("two_pass", 29.5, 30.0, shape=large),  # within the spread
        row("two_pass", 20.0, 30.0, shape=large, direction="forward"),
        row("two_pass", 20.0, 30.0, shape=large, mode="plain"),
        row("two_pass", 20.0, 30.0, shape=large, dtype="fp16"),
        row("two_pass", 20.0, 30.0, shape=large, what="basic_blocks"),
        row("cooperative", 40.0, 30.0, shape=small),  # lost
        row("two_pass", 20.0, 30.0, shape=small),
    ]
    assert bench_kernels.fastest(rows) == (
        (9, 0),
        {
            (131072, 16, False): "cooperative",
            (131072, 16, True): "two_pass",
            (3211264, 64, False): "torch",  # measured, and not faster
            (8192, 64, False): "two_pass",
        },
    )


def test_the_measured_table_is_written_where_the_kernels_read_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert dispatch_table.read() == dispatch_table.FASTEST and dispatch_table.FILE.is_file()
    monkeypatch.setattr(dispatch_table, "FILE", tmp_path / "fastest.json")
    monkeypatch.setattr(dispatch_table, "FASTEST", {(8, 0): {(18, 4, True): "two_pass"}})
    line = bench_kernels.write_table([row("two_pass", 20.0, 30.0), row("two_pass", 40.0, 30.0, shape=[128, 64, 8, 8])])
    assert "faster at 1 of 2 shapes" in line and str(dispatch_table.FILE) in line
    hopper = {(131072, 16, False): "two_pass", (8192, 64, False): "torch"}
    assert dispatch_table.read() == {(8, 0): {(18, 4, True): "two_pass"}, (9, 0): hopper}
    monkeypatch.setattr(dispatch_table, "FASTEST", dispatch_table.read())
    bench_kernels.write_table([row("two_pass", 40.0, 30.0)])  # when one shape is measured again, the other stays
    assert dispatch_table.read()[9, 0] == hopper | {(131072, 16, False): "torch"}
    assert "nothing to write on a CPU" in bench_kernels.write_table([row("reference", 1, 1, capability=None)])


def test_bytes_of_a_cooperative_kernel_are_two_pass_where_it_does_not_fit() -> None:
    h100 = 132  # multiprocessors
    large, small = (bench_kernels.Case("bn_add_relu", (128, c, s, s), "bf16") for c, s in ((16, 32), (64, 8)))
    assert bench_kernels.bytes_per_element(small, "two_pass", "full", h100) == 8.125 + 14.125
    assert bench_kernels.bytes_per_element(small, "cooperative", "full", h100) == 6.125 + 10.125
    assert bench_kernels.bytes_per_element(large, "cooperative", "full", h100) == 6.125 + 14.125
    assert bench_kernels.bytes_per_element(small, "apex", "full", h100) is None


# ---- the suite's record and its report --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of a part of the suite, kept as a user's are."""
    storage = tmp_path_factory.mktemp("results")
    for compare in ((), ("--benchmark-compare",)):
        done = pytest_bench(
            *("bench/bench_time_to_90.py", "--seeds", "2", "-k", "digits and warm"),
            *(f"--benchmark-storage={storage.as_uri()}", "--benchmark-autosave", "--benchmark-save-data", *compare),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "time of runs that reach 90 %" in done.stdout and "of 2 runs below 90 %" in done.stdout
    assert "0001_" in done.stdout  # the earlier run, in the comparison's table
    assert "machine_info is different" not in done.stdout + done.stderr
    return sorted(storage.rglob("*.json"))


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    """Return the results of two runs on one device, which are in the repository."""
    found = sorted((CHECKOUT / "bench" / "results").rglob("*.json"))
    assert len(found) >= 2
    return found[:2]


def pytest_bench(*args: str) -> subprocess.CompletedProcess[str]:
    how = ("-q", "--benchmark-only", "-p", "no:cacheprovider")
    return run_module("pytest", *how, *args, cwd=CHECKOUT)


def run_report(*args: Path) -> subprocess.CompletedProcess[str]:
    return run_module("bench.report", *args, cwd=CHECKOUT)


@pytest.mark.slow
def test_a_result_says_where_it_is_from(results: list[Path]) -> None:
    assert len(results) == 2
    content = json.loads(results[0].read_text())
    assert {"device", "torch", "triton", "commit", "threads"} <= set(content["machine_info"]["fastres"])
    state = content["state"]
    for moment in (state["before"], state["after"]):
        assert len(moment["host"]["load_average"]) == 3 and moment["gpu"] is None
    assert isinstance(state["disturbances"], list) and "--seeds" in state["command"]
    assert len(content["benchmarks"][0]["stats"]["data"]) == 2  # every round
    info = content["benchmarks"][0]["extra_info"]
    assert (info["contest"], info["kind"], info["steps"], info["n"]) == ("digits", "warm", 60, 2)
    assert len(info["times_s"]) == len(info["accuracies"]) == 2 and all(time > 0 for time in info["times_s"])
    assert info["mean_accuracy"] == pytest.approx(sum(info["accuracies"]) / 2) and info["mean_accuracy"] > 0.7
    assert info["misses"] == sum(accuracy < 0.9 for accuracy in info["accuracies"])
    assert 0 <= info["p_value"] <= 1


def test_the_report_has_the_device_the_commits_and_a_row_per_result(committed: list[Path]) -> None:
    done = run_report(*committed)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    device = json.loads(committed[0].read_text())["machine_info"]["fastres"]["device"]
    assert lines[0] == f"## {device}"
    assert sum("commit" in line for line in lines) == 2
    assert any(line.startswith("digits     warm") for line in lines)


def test_the_report_rejects_results_of_different_devices(committed: list[Path], tmp_path: Path) -> None:
    content = json.loads(committed[1].read_text())
    content["machine_info"]["fastres"]["device"] = "another machine"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    done = run_report(committed[0], other)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert "another machine" in line and "do not compare" in line


def test_the_report_names_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = run_report(tmp_path / "config.json")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "config.json" in line


def test_costs_without_a_sweep_are_not_drawn(tmp_path: Path) -> None:
    cost = Row("bench/bench_scaling.py::bench_cost[DDP on one process]", {"sweep": "cost"})
    assert report.draw("a device", [cost], tmp_path) == []


def test_committed_results_under_older_names_are_still_read() -> None:
    paths = sorted((CHECKOUT / "bench" / "results").glob("Linux-*/*.json"))
    rows = [row for run in report.read(paths) for row in run.rows if row.file == "bench_loaders.py"]
    assert rows and all(row.info["appetite_images_per_s"] == consumer_rate(row.info)[0] for row in rows)
    assert consumer_rate({"consumer_images_per_s": 2.0, "times_consumer_rate": 3.0}) == (2.0, 3.0)


def test_the_old_name_of_targets_works_and_prints_a_note() -> None:
    old, new = (run_module("bench.report", flag, cwd=CHECKOUT) for flag in ("--claims", "--targets"))
    assert (old.returncode, new.returncode) == (0, 0) and old.stdout == new.stdout and "not measured" in new.stdout
    assert old.stderr.strip() == "fastres: --claims is now --targets; the old spelling works for one version"


@pytest.mark.parametrize(
    ("accuracies", "low", "high"),
    [
        ([0.95, 0.96, 0.94, 0.95, 0.95], 0, 1e-3),
        ([0.91, 0.89, 0.92, 0.88, 0.90], 0.4, 0.6),
        ([0.85, 0.86, 0.84], 0.9, 1),
        ([0.9, 0.9], 1, 1),
        ([0.92, 0.92], 0, 0),
    ],
)
def test_the_p_value_is_one_sided(accuracies: list[float], low: float, high: float) -> None:
    p = p_value(accuracies)
    assert p is not None and low <= p <= high


@pytest.mark.slow
def test_throughput_is_interleaved_with_the_plain_loop_and_every_figure_is_recorded(tmp_path: Path) -> None:
    done = pytest_bench(
        *("bench/bench_throughput.py", "-k", "mini_resnet and infer and default"),
        f"--benchmark-json={tmp_path / 'rows.json'}",
        f"--benchmark-storage={(tmp_path / 'kept').as_uri()}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["benchmarks"]
    info = row["extra_info"]
    assert info["n"] == len(info["ratios"]) == len(info["baseline_s"]) >= 5
    convolutions = 28 * 28 * 7 * 7 * 64 + 4 * 9 * 9 * 3 * 3 * 64 * 64
    assert info["gflop_per_s"] == pytest.approx(info["images_per_s"] * 2e-9 * (convolutions + 64 * 10))
    assert info["share_of_peak"] is None and info["peak_memory_bytes"] is None  # a GPU's
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("mini_resnet infer default"))
    assert 0 < info["share_of_product"] < 2 and line.endswith(" of a matrix product's rate")


# ---- held-out accuracies ---------------------------------------------------------------------------------------


def held_out(*args: object) -> subprocess.CompletedProcess[str]:
    quick = ("--recipe", "digits", "--model.name", "resnet8", "--train.steps", 30, "--schedule.warmup_steps", 5)
    return run_module("bench.held_out", *quick, *args, cwd=CHECKOUT)


@pytest.mark.slow
def test_settings_are_compared_on_held_out_samples_over_seeds(tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    done = held_out("--seeds", 2, "--output", written, "+", "--optim.lr", 1e-6, "+", "--optim.name", "muon")
    assert done.returncode == 0, done.stderr
    best, worst = done.stdout.splitlines()[-2:]  # the best first
    assert "(n=2)" in best and best.endswith("--optim.name muon") and worst.endswith("--optim.lr 1e-06")
    slow, muon = json.loads(written.read_text())
    assert all(len(setting["accuracies"]) == len(setting["train_time_s"]) == 2 for setting in (slow, muon))
    assert max(slow["accuracies"]) < min(muon["accuracies"])
    assert max(slow["train_accuracies"]) < min(muon["train_accuracies"]) and "training 0." in best
    for accuracy in (*slow["accuracies"], *muon["accuracies"]):
        assert accuracy * 143 == pytest.approx(round(accuracy * 143))  # a tenth of 1,437


def test_settings_of_different_data_are_rejected_before_anything_runs() -> None:
    done = held_out("+", "--data.pad", 0, "+", "--data.pad", 1)
    assert (done.returncode, done.stdout) == (2, "")
    assert "give --data's flags before the first +" in done.stderr and len(done.stderr.splitlines()) == 1
