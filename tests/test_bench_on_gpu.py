"""bench/run_on_gpu.sh with stages from a file, as a user runs it; its benches as far as a CPU allows; the targets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.bench_kernel_times import kernel_times
from bench.bench_peers import last_row, shortest
from bench.bench_schedule import compare_folders
from bench.lib.plain_loop import PlainRun, difference
from bench.lib.runs import run
from bench.lib.stats import compared, is_identical, merge_seeds, not_lower, run_statistics
from bench.lib.tables import Row, accuracy_lines, peer_lines
from bench.lib.targets import lines
from fastres.config.cli import parse
from fastres.data.sources.load import load_source
from tests.commands import users_environment

CHECKOUT = Path(__file__).parent.parent
SCRIPT = CHECKOUT / "bench" / "run_on_gpu.sh"
PYTHON = {"PYTHON": sys.executable}

# ---- the script -------------------------------------------------------------------------------------------------


def script(*args: str | Path, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *map(str, args)], cwd=cwd, env=users_environment(PYTHON), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


class Stages:
    """Stages in a file, with their marks and logs beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arguments = ("--stages", folder / "stages", "--record", folder / "done", "--logs", folder / "logs")

    def write(self, **commands: str) -> None:
        stages = (f"{name} | 1 | 5 | no | - | what it is | {command}" for name, command in commands.items())
        (self.folder / "stages").write_text("# a comment\n\n" + "\n".join(stages) + "\n", "utf-8")

    def run(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        return script(*self.arguments, *args)

    def log(self, name: str) -> str:
        (path,) = self.folder.glob(f"logs/*/{name}.log")
        return path.read_text("utf-8")


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    return Stages(tmp_path)


def test_help_explains_the_usage() -> None:
    done = script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--data DIR" in done.stdout and "pip install -e '.[dev,peers]'" in done.stdout


@pytest.mark.slow
def test_the_list_has_every_stage_and_the_essential_part_is_within_25_minutes() -> None:
    everything, essential = script("--list"), script("--list", "--essential")
    assert everything.returncode == essential.returncode == 0, everything.stderr + essential.stderr
    rows = [line.split() for line in everything.stdout.splitlines()[1:-1]]
    marked = [row for row in rows if row[2] == "yes"]
    assert [row[0] for row in marked] == [line.split()[0] for line in essential.stdout.splitlines()[1:-1]]
    assert sum(int(row[1]) for row in marked) <= 25
    assert rows[: len(marked)] == marked
    first = next(i for i, row in enumerate(marked) if "table" in row[3])  # a stage that uses the kernels' table
    for part in (marked[:first], marked[first:], rows[len(marked) :]):  # cheapest first
        assert [int(row[1]) for row in part] == sorted(int(row[1]) for row in part)


def test_no_stage_writes_the_table_of_kernels_after_a_stage_that_uses_it() -> None:
    """A changed table would invalidate the stage, so that it would be measured again."""
    stages = [line.split("|") for line in SCRIPT.read_text("utf-8").splitlines() if line.count("|") == 6]
    writes = [i for i, stage in enumerate(stages) if "fused " in stage[6] or "--write-table" in stage[6]]
    takes = [i for i, stage in enumerate(stages) if "table" in stage[4]]
    assert len(writes) == 2 and max(writes) < min(takes)


def test_every_stage_names_an_existing_bench() -> None:
    files = {
        word
        for line in SCRIPT.read_text("utf-8").splitlines()
        if line.count("|") == 6 and "| bench " in line
        for word in [line.rpartition("| bench ")[2].split()[0]]
    }
    assert {"schedule", "accuracy", "peers", "kernels", "kernel_times", "compile"} <= files
    assert all((CHECKOUT / "bench" / f"bench_{name}.py").is_file() for name in files)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--data", "."), "torch sees no GPU here"),
        (("--data",), "--data needs a value"),
        (("--everything",), "unknown argument --everything"),
        (("--only", "nothing"), "--only nothing: unknown stage; --list names them"),
        (("--essential", "--only", "doctor"), "--essential: cannot be combined with --only"),
        (("--stages", "nowhere"), "cannot read"),
    ],
)
def test_a_missing_requirement_is_rejected_in_one_line(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = script(*args, "--record", tmp_path) if args != ("--data",) else script(*args)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("run_on_gpu: error: ") and said in line
    assert not list(tmp_path.iterdir())


def test_a_stage_that_needs_data_is_rejected_without_it(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "stages").write_text('reads | 1 | 1 | no | data | its data | ls "$DATA"; echo $DATA_OPTION\n')
    missing, empty = "--data: is missing; give the folder of CIFAR-10", "neither cifar-10-batches-py"
    for args, said in (((), missing), (("--data", tmp_path), empty)):
        done = stages.run(*args)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    for part in ("train", "test"):
        (tmp_path / "a copy" / part).mkdir(parents=True)
    assert stages.run("--data", tmp_path / "a copy").returncode == 0
    assert stages.log("reads").split() == ["test", "train", "--jpeg-copy"]
    (tmp_path / "a copy" / "cifar-10-batches-py").mkdir()
    assert "reads          done in" in stages.run("--data", tmp_path / "a copy").stdout  # the data is different
    assert "--data-root" in stages.log("reads")


def test_a_failure_is_reported_with_its_log_and_the_others_go_on(stages: Stages) -> None:
    stages.write(first="echo one | tr a-z A-Z", fails="echo the reason; exit 3", last="echo two")
    done = stages.run()
    assert done.returncode == 1
    assert stages.log("first") == "ONE\n" and stages.log("last") == "two\n"
    assert "   | the reason" in done.stdout
    summary = done.stdout.partition("== stages\n")[2].splitlines()
    assert [line.split()[:2] for line in summary] == [["first", "done"], ["fails", "failed"], ["last", "done"]]
    assert "with status 3" in summary[1] and summary[1].endswith("fails.log")


def test_a_finished_stage_is_not_repeated_and_a_failed_one_is(stages: Stages) -> None:
    stages.write(counts=f"echo x >>{stages.folder}/count", waits=f"test -e {stages.folder}/ready")
    count = stages.folder / "count"
    assert stages.run().returncode == 1
    (stages.folder / "ready").touch()
    done = stages.run()
    assert done.returncode == 0
    assert "counts         done before" in done.stdout and "waits          done in" in done.stdout
    assert count.read_text() == "x\n"
    assert stages.run("--list").stdout.splitlines()[1].split()[:5] == ["counts", "1", "no", "-", "yes"]
    assert stages.run("--again", "--only", "counts").returncode == 0
    assert count.read_text() == "x\nx\n"
    stages.write(counts=f"echo another command >>{count}", waits="true")
    assert stages.run().returncode == 0 and count.read_text().endswith("another command\n")


def test_a_stage_that_hangs_is_stopped_and_the_others_go_on(stages: Stages, tmp_path: Path) -> None:
    stages.write(after="true")
    (tmp_path / "stages").write_text(
        "hangs | 1 | 1s | no | - | hangs | sleep 1000\n" + (tmp_path / "stages").read_text(), "utf-8"
    )
    done = stages.run()
    assert done.returncode == 1
    assert "hangs          stopped after 1s" in done.stdout and "after          done in" in done.stdout


def test_an_interrupt_ends_the_stage_and_all_that_it_started(stages: Stages) -> None:
    stages.write(first="true", sleeps=f"sh -c 'echo $$ >{stages.folder}/pid; sleep 1000'", last="true")
    running = subprocess.Popen(
        [SCRIPT, *map(str, stages.arguments)], env=users_environment(PYTHON), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    pid = stages.folder / "pid"
    while not (pid.exists() and pid.read_text().endswith("\n")):
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted; the same command continues from here" in said
    assert ended(int(pid.read_text()))
    stages.write(first="true", sleeps="true", last="true")
    assert "first          done before" in stages.run().stdout


def ended(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_bench_that_skips_all_is_not_done(stages: Stages) -> None:
    stages.write(kernel_times="bench kernel_times -p no:cacheprovider")
    done = stages.run()
    assert done.returncode == 1
    assert "nothing was measured" in done.stdout and "a CPU has no kernels" in done.stdout


# ---- its benches ------------------------------------------------------------------------------------------------

DIGITS = (
    "--recipe digits --model.name resnet8 --train.steps 6 --train.eval_every 6 --train.log_every 1 "
    "--train.batch_size 32 --schedule.warmup_steps 2"
).split()


def test_the_plain_run_is_the_engines_run_in_fp32(tmp_path: Path) -> None:
    """Weights, batches, schedule and the loss of every step agree; only the way of computing differs."""
    flags = [*DIGITS, "--engine.precision", "fp32", "--model.norm", "torch"]
    config = parse(flags)
    source = load_source(config.data)
    losses = PlainRun(config, source, deterministic=True).steps(0, 6)
    run(flags, 0, tmp_path / "ours", source)
    rows = map(json.loads, (tmp_path / "ours" / "metrics.jsonl").read_text("utf-8").splitlines())
    ours = [row["loss"] for row in rows if row["split"] == "train"]
    assert ours == pytest.approx(losses.tolist(), rel=1e-4)


def test_a_benchmarks_run_has_the_seed_and_the_source_that_it_was_given(tmp_path: Path) -> None:
    flags = [*DIGITS, "--engine.precision", "fp32"]
    source = load_source(parse(flags).data)
    few = replace(source, test=source.test.subset(np.arange(50)))
    summaries = [run(flags, seed, tmp_path / str(seed), few) for seed in (3, 4)]
    assert [summary["seed"] for summary in summaries] == [3, 4]
    assert [summary["test_samples"] for summary in summaries] == [50, 50]
    assert summaries[0]["test_loss"] != summaries[1]["test_loss"]


@pytest.mark.slow
def test_the_report_has_the_results_of_schedule_and_accuracy(tmp_path: Path) -> None:
    """Real runs on a CPU: the schedule as far as it goes, and accuracy beside the plain loop."""
    rows = tmp_path / "rows.json"
    storage = f"--benchmark-storage={(tmp_path / 'kept').as_uri()}"
    for command in (
        ("-m", "pytest", "-q", "--benchmark-only", "-p", "no:cacheprovider", storage, f"--benchmark-json={rows}",
         "bench/bench_schedule.py", "bench/bench_accuracy.py", "--seeds", "2"),
        ("-m", "bench.report", str(rows)),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command], cwd=CHECKOUT, env=users_environment(PYTHON), capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    kept = {row["name"]: row["extra_info"] for row in json.loads(rows.read_text("utf-8"))["benchmarks"]}
    schedule, seeds = kept["bench_schedule"], [kept[f"bench_parity[seed{seed}-digits]"] for seed in range(2)]
    assert {name: len(turn["seconds"]) for name, turn in schedule["turns"].items()} == {"plain": 3, "fastres": 3}
    assert schedule["times_as_fast"]["plain"] > 0
    (parity,) = merge_seeds(seeds)
    for of in parity["accuracies"].values():
        assert len(of) == parity["n"] == 2 and min(of) > 0.7
    assert parity["twin"] is None and parity["plain_is"] == "the loop"  # it needs no twin on a CPU
    report = done.stdout
    assert "images/s of the schedule" in report and "fastres " in report and "difference " in report
    assert "### targets" not in report  # that is for a GPU


def test_a_difference_is_found_where_there_is_one(tmp_path: Path) -> None:
    config, other = parse(DIGITS), parse([*DIGITS, "--run.seed", "1"])
    source = load_source(config.data)
    assert is_identical(difference(PlainRun(config, source), PlainRun(config, source, deterministic=True), 3))
    found = difference(PlainRun(config, source), PlainRun(other, source), 3)
    assert found["first_different_step"] == 0 and not found["state_equal"]
    for name, seed in (("a", 0), ("b", 1)):
        run(DIGITS, seed, tmp_path / name, source)
    found = compare_folders(tmp_path / "a", tmp_path / "b")
    assert found["first_different_step"] == 1 and not found["state_equal"]


def test_a_trace_is_split_into_the_parts_of_a_step() -> None:
    """Two steps of a 3 us and a 2 us kernel; 1 us between them, 4 us between the steps, and a copy that overlaps."""

    def ran(name: str, start: float, us: float, cat: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": us}

    events = [
        ran("aten::conv2d", 0, 100, "cpu_op"),
        *(ran("conv", 10, 3), ran("norm", 14, 2), ran("conv", 20, 3), ran("norm", 24, 2)),
        ran("Memcpy", 11, 1, "gpu_memcpy"),
    ]
    found = kernel_times(events, 2)
    assert (found["kernels"], found["span_us"], found["busy_us"]) == (2.5, 8, 5)
    assert (found["gaps"], found["gaps_us"], found["largest_gaps_us"]) == (1.5, 3, [4, 1, 1])
    rows = [(row["name"], row["calls"], row["us"]) for row in found["by_kernel"]]
    assert rows == [("conv", 1, 3), ("norm", 1, 2), ("Memcpy", 0.5, 0.5)]
    # A trace without kernels is no error, because an error would lose the step's time.
    assert kernel_times(events[:1], 2)["kernels"] == 0


def test_time_and_accuracy_come_from_airbenchs_last_row() -> None:
    said = """\
-------------------------------------------------------------------------------------------------
|  run     |  epoch  |  train_loss  |  train_acc  |  val_acc  |  tta_val_acc  |  total_time_seconds  |
-------------------------------------------------------------------------------------------------
|       0  |      0  |      1.5713  |     0.5498  |   0.5270  |               |              0.4075  |
|          |      1  |      1.2038  |     0.7529  |   0.7420  |               |              0.8090  |
|          |   eval  |      1.2038  |     0.7529  |   0.7420  |       0.7421  |              0.8312  |
-------------------------------------------------------------------------------------------------
"""
    assert last_row(said) == (0.8312, 0.7421)


@pytest.mark.parametrize(
    ("enough_from", "wrong_at", "found"),
    [
        (4.0, None, (4.0, True)),
        (2.0, None, (2.0, True)),
        (5.0, None, (5.0, True)),
        (9.0, None, (5.0, False)),
        (3.0, 3.0, (4.0, True)),  # with few trials, 3 seemed enough
    ],
)
def test_the_shortest_length_is_found_that_averages_90(
    enough_from: float, wrong_at: float | None, found: tuple[float, bool]
) -> None:
    def averages_90(length: float, trials: int) -> bool:
        return length >= enough_from and not (length == wrong_at and trials > 3)

    assert shortest((2.0, 3.0, 4.0, 5.0), averages_90) == found


@pytest.mark.parametrize(
    ("ours", "plain", "verdict"),
    [
        ([0.91, 0.92], [0.90, 0.91], True),
        ([0.90, 0.92], [0.91, 0.93], True),  # lower by 0.01, which is less than two standard errors, 0.028
        ([0.900, 0.901], [0.910, 0.911], False),
        ([0.9], [0.9, 0.9], None),
    ],
)
def test_accuracy_may_be_lower_by_at_most_two_standard_errors(
    ours: list[float], plain: list[float], verdict: bool | None
) -> None:
    assert not_lower(compared(ours, plain)) is verdict


# ---- the targets ------------------------------------------------------------------------------------------------


def found_in(*rows: tuple[str, dict[str, Any]]) -> dict[str, str]:
    """Return the text after each target."""
    made = lines([Row(f"bench/bench_{file}.py::bench_it[{i}]", info) for i, (file, info) in enumerate(rows)])
    return {line[:72].strip(): line[114:] for line in made}


def parity(*seeds: int, seconds: float = 25.0, **other: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return rows as bench_parity leaves them, one for each seed."""
    return [
        ("accuracy", {
            "what": "parity", "model": "resnet20", "steps": 64_000, "data": "cifar10", "precision": "bf16",
            "n": 1, "seeds": [seed], "train_time_s": [seconds + seed / 10],
            "accuracies": {"fastres": [0.915 + seed / 1e4], "plain": [0.916 + seed / 1e4]}, "plain_is": "graphed twin",
            "twin": {"steps": 300, "first_different_step": None, "state_equal": True}, **other,
        })
        for seed in seeds
    ]  # fmt: skip


TRAINING, ACCURACY = "ResNet-20, batch 128, 64,000 steps: training", "accuracy against plain fp32"


def test_a_target_that_was_not_measured_says_so() -> None:
    assert set(found_in().values()) == {"not measured"}
    assert set(found_in(*parity(0, steps=60, model="resnet8")).values()) == {"not measured"}


def test_a_measured_target_is_reached_or_not() -> None:
    found = found_in(*parity(*range(5)))
    assert found[TRAINING] == "reached       25.20 ± 0.16 s, n=5"
    assert found[ACCURACY].startswith("not reached   0.9152 on cifar10, n=5; plain 0.9162, n=5: -0.0010 ± 0.0001")
    alike = {"accuracies": {"fastres": [0.915], "plain": [0.915]}}
    assert found_in(*parity(*range(5), **alike))[ACCURACY].startswith("reached ")
    assert found_in(*parity(*range(5), seconds=31.0))[TRAINING].startswith("not reached")
    assert found_in(*parity(*range(5), seconds=19.0))[TRAINING].startswith("reached, stretch")


def test_insufficient_evidence_does_not_reach_a_target() -> None:
    other = {"steps": 300, "first_different_step": 7, "state_equal": False}
    only_ours = {"accuracies": {"fastres": [0.915]}}
    for rows in (
        parity(*range(4)),
        parity(*range(5), twin=None),
        parity(*range(4)) + parity(4, twin=other, **only_ours),
        parity(*range(4)) + parity(4, **only_ours),
    ):
        assert found_in(*rows)[ACCURACY].startswith("not shown")
        assert found_in(*rows)[TRAINING].startswith("reached")  # it has no twin


def test_a_seed_counts_once_as_it_was_measured_last() -> None:
    rows = [info for _, info in (*parity(0, 1), *parity(1, 2, seconds=30.0))]
    (merged,) = merge_seeds(rows)
    assert merged["n"] == 3 and merged["mean_train_time_s"] == pytest.approx((25.0 + 30.1 + 30.2) / 3)
    two = {"n": 2, "train_time_s": [25.0, 25.1], "accuracies": {"fastres": [0.9, 0.8], "plain": [0.7, 0.6]}}
    at_once = {name: value for name, value in (rows[0] | two).items() if name != "seeds"}  # the rows' former format
    assert merge_seeds([at_once])[0]["mean_accuracy"] == {"fastres": pytest.approx(0.85), "plain": pytest.approx(0.65)}
    (text,) = [
        line
        for line in accuracy_lines([Row("bench/bench_accuracy.py::bench_parity", info) for info in rows])
        if "plain loop in fp32" in line
    ]
    assert "plain loop in fp32, as its graphed twin: 0.9161, n=3" in text


def test_the_data_set_itself_goes_before_a_copy() -> None:
    copy = parity(0, data="CIFAR-10 (JPEG copy)", seconds=99.0)
    assert "25.00" in found_in(*copy, *parity(0))[TRAINING]


def test_the_faster_of_two_compiled_loops_counts() -> None:
    info = {"what": "schedule", "n": 5}
    both = {"plain": 16.0, "torch.compile": 4.0, "torch.compile, bf16, channels-last": 2.5}
    found = found_in(("schedule", info | {"times_as_fast": both}))
    assert found["against a plain eager fp32 loop"].startswith("reached")
    assert found["against torch.compile alone"].startswith("not reached")
    found = found_in(("schedule", info | {"times_as_fast": {"plain": 2.0}}))  # as on a CPU
    assert found["against torch.compile alone"] == "not measured"


def test_time_to_90_counts_from_25_runs_that_reach_it() -> None:
    def runs(seconds: float, accuracy: float) -> dict[str, Any]:
        return run_statistics([(seconds, accuracy + i / 1e4) for i in range(25)])

    info = {
        "peer": "airbench", "data": "cifar10", "n": 25, "epochs": 3.5, "peer_averages_90": True,
        "fastres": runs(0.9, 0.905), "airbench": runs(1.1, 0.899),
    }  # fmt: skip
    target = "time to 90 %, warm, against airbench's"
    assert found_in(("peers", info))[target].startswith("reached")
    assert found_in(("peers", info | {"n": 24}))[target].startswith("not shown")
    short_of_it = {"fastres": runs(0.9, 0.899)}
    assert found_in(("peers", info | short_of_it))[target].startswith("not shown")
    slower = info | {"fastres": runs(1.2, 0.905)}
    assert found_in(("peers", slower))[target].startswith("not reached")
    too_short = {"peer_averages_90": False, "epochs": 26.0}
    assert found_in(("peers", info | too_short))[target].startswith("reached")
    assert "airbench does not average 90 % in 26.0 epochs" in found_in(("peers", slower | too_short))[target]
    (line,) = peer_lines(Row("bench/bench_peers.py::bench_airbench", info))
    assert "fastres 0.900 s ± 0.000 to 0.9062, airbench 1.100 s ± 0.000 to 0.9002, cut to 3.5 epochs" in line


def test_the_better_kernel_of_each_shape_counts() -> None:
    info = {
        "what": "bn_relu", "shape": [128, 16, 32, 32], "dtype": "bf16", "direction": "full", "mode": "graph",
        "variant": "two_pass", "baseline": "inductor", "ratio": 0.9,
    }  # fmt: skip
    other = info | {"shape": [128, 64, 8, 8], "ratio": 1.3}
    target = "BatchNorm + ReLU (+ add), fused, against inductor's"
    rows = [("kernels", info), ("kernels", other)]
    assert "not reached   median 1.10 x, least 0.90 x, 2 shapes" in found_in(*rows)[target]
    rows.append(("kernels", info | {"variant": "cooperative", "ratio": 1.2}))
    assert "reached       median 1.25 x, least 1.20 x, 2 shapes" in found_in(*rows)[target]
    assert (
        found_in(("kernels", info | {"mode": "plain"}), ("kernels", info | {"variant": "eager"}))[target]
        == "not measured"
    )


def test_a_peer_counts_compiled_and_on_the_feed_of_the_target() -> None:
    info = {
        "peer": "timm", "feed": "dali", "compiled": True, "ratio": 1.1, "images_per_s": 2_000.0, "n": 15,
        "images_per_s_20_80": [1_990.0, 2_010.0],
    }  # fmt: skip
    found = found_in(("peers", info), ("peers", info | {"feed": "synthetic", "compiled": False}))
    assert found["ResNet-50, bf16, 224 px, dali, against timm"].startswith("reached")
    assert found["ResNet-50, bf16, 224 px, synthetic, against timm"] == "not measured"
