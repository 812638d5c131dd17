"""`fastres profile --limits` says what limits a run: the rule, the sentence, and real runs.

No time is asserted. The real runs are limited by more than a factor of ten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastres import profile
from fastres.config.cli import parse
from fastres.config.schema import Config, DataConfig
from fastres.profiling.limits import Feed, Limits, better_choices, measure_limits, show, synthetic_batch, work_of
from fastres.profiling.trace import Operator
from fastres.profiling.verdict import EDGE, FAR, Evidence, Times, limits_of, sentence, verdict_of
from fastres.testing.op_recorder import OpRecorder
from fastres.training.engine import resolve_engine
from fastres.utils.errors import UsageError
from tests.commands import run_fastres
from tests.fixtures import engine, write_image_folder

# ---- the rule


def times_of(run: float, loader: float, *parts: float, overlaps: bool = True, cores: int = 1) -> Times:
    """Return times; `parts` are compute, memory, launches and slow, whose sum is the step."""
    compute, memory, launches, slow = parts
    return Times(
        run=run, step=sum(parts), loader=loader, overlaps=overlaps, loader_cores=cores,
        compute=compute, memory=memory, launches=launches, slow=slow,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("times", "limits"),
    [
        (times_of(30, 30, 6, 2, 1, 1), ("loader",)),
        (times_of(13, 13, 10, 0, 0, 0), ("loader",)),  # although compute takes most of the time
        (times_of(12, 12, 6, 2, 1, 1), ("loader", "compute")),
        (times_of(10, 9, 4, 4, 1, 1), ("loader", "compute", "memory")),
        (times_of(10, 13, 6, 2, 1, 1), ("loader", "compute")),  # slow alone, but the run is no slower for it
        (times_of(10, 2, 6, 2, 1, 1), ("compute",)),
        (times_of(10, 2, 2, 6, 1, 1), ("memory",)),
        (times_of(10, 2, 2, 1, 6, 1), ("launches",)),
        (times_of(10, 2, 2, 1, 1, 6), ("slow",)),
        (times_of(10, 2, 4, 3.5, 2, 0.5), ("compute", "memory")),
        (times_of(10, 2, 3.5, 4, 2, 0.5), ("memory", "compute")),
        (times_of(9, 2, 6, 2, 1, 1), ("compute",)),  # the run is faster by chance
        (times_of(40, 2, 6, 2, 1, 1, cores=16), ("loader",)),  # fast alone, but it takes the step's cores
        (times_of(40, 2, 6, 2, 1, 1, cores=1), ("compute",)),  # one core's work cannot slow the run by that much
        (times_of(10.2, 0.2, 6, 2, 1, 1, overlaps=False), ("compute",)),
        (times_of(30, 20, 6, 2, 1, 1, overlaps=False), ("loader",)),
        (times_of(16, 6, 6, 2, 1, 1, overlaps=False), ("loader", "compute")),
    ],
)
def test_the_times_decide_what_limits_a_run(times: Times, limits: tuple[str, ...]) -> None:
    assert set(limits_of(times)) == set(limits)
    assert limits_of(times)[0] == limits[0]


def test_the_shares_of_a_disturbed_run_add_up_to_its_time() -> None:
    times = times_of(40, 2, 6, 2, 1, 1, cores=1)
    assert (times.lost, times.disturbed) == (2, 28)
    assert times.share("disturbed") == 28 / 40 and times.share("compute") == 6 / 40
    assert sum(times.share(part) for part in ("loader", "disturbed", "compute", "memory", "launches", "slow")) == 1


def test_nothing_near_a_threshold_is_claimed_as_certain() -> None:
    for factor in (0.99 * EDGE, 1.01 / EDGE):
        assert limits_of(times_of(10, 2, 4, 4 * factor, 0, 1)) != ("compute",)
        assert limits_of(times_of(10 * max(1, factor), 10 * factor, 8, 1, 1, 0)) == ("loader", "compute")
    assert limits_of(times_of(10, 2, 4, 4 * 0.99 / EDGE, 0, 1)) == ("compute",)
    assert limits_of(times_of(10.1 * EDGE, 10.1 * EDGE, 8, 1, 1, 0)) == ("loader",)
    assert limits_of(times_of(10, 9.9 / EDGE, 8, 1, 1, 0)) == ("compute",)


def test_a_verdict_counts_the_rounds_that_agree() -> None:
    loader, both, compute = times_of(30, 30, 10, 0, 0, 0), times_of(10, 10, 10, 0, 0, 0), times_of(10, 1, 10, 0, 0, 0)
    found = verdict_of(loader, [loader, loader, both, compute])
    assert (found.limits, found.agreeing, found.rounds) == (("loader",), 2, 4)


# ---- the sentence


def evidence_of(times: Times, **changes: Any) -> Evidence:
    given: dict[str, Any] = {
        "times": times, "batch": 100, "launches": 1234.0, "reached": {"compute": 0.4, "memory": 0.7},
        "slowest": "aten::add_", "config": Config(data=DataConfig(loader="dataloader")), "on_gpu": False,
        "captured": False, "cpus": 8, "better": {},
    }  # fmt: skip
    return Evidence(**{**given, **changes})


PHOTOS = Config(data=DataConfig(source="imagefolder", loader="dataloader", augment="resized_crop", image_size=224))


@pytest.mark.parametrize(
    ("times", "changes", "expected"),
    [
        (
            times_of(0.04, 0.04, 0.01, 0, 0, 0),
            {},
            "The loader limits this run (1 of 1 rounds agree): the loader makes 2,500 images/s alone, the step could "
            "take 10,000. Remedy: more --data.workers (2 now, of 8 CPU cores), or --data.loader resident if the images "
            "fit in memory.",
        ),
        (
            times_of(0.04, 0.04, 0.01, 0, 0, 0),
            {"config": PHOTOS, "cpus": 2},
            "Remedy: --data.loader dali, or image files that are stored smaller.",
        ),
        (
            times_of(0.04, 0.03, 0.01, 0, 0, 0, overlaps=False),
            {"config": Config()},
            "the step takes 10,000 images/s without the loader and 2,500 with it, because both need the CPU. Remedy: "
            "less augmentation",
        ),
        (
            times_of(0.01, 0.001, 0.006, 0.004, 0, 0),
            {},
            "Compute limits this run (1 of 1 rounds agree): operators that mostly compute take 60% of the time, at 40% "
            "of the rate of a large matrix product. Remedy: a smaller network, smaller images, or a faster device.",
        ),
        (
            times_of(0.01, 0.001, 0.004, 0.006, 0, 0),
            {"better": {"engine.precision": "--engine.precision auto (bf16 here)", "engine.conv": "not for memory"}},
            "Memory bandwidth limits this run (1 of 1 rounds agree): operators that mostly move data take 60% of the "
            "time, at 70% of the rate of a large copy. Remedy: --engine.precision auto (bf16 here).",
        ),
        (
            times_of(0.01, 0.001, 0.002, 0.002, 0.006, 0),
            {"on_gpu": True},
            "Launches limit this run (1 of 1 rounds agree): the GPU is idle for 60% of the time while the CPU launches "
            "1,234 kernels a step. Remedy: --data.loader resident, with which a step becomes one CUDA graph, or a "
            "larger --train.batch_size.",
        ),
        (
            times_of(0.01, 0.001, 0.002, 0.002, 0.006, 0),
            {},
            "60% of the time passes between the 1,234 operators of a step. Remedy: a larger --train.batch_size.",
        ),
        (
            times_of(0.01, 0.001, 0.002, 0.002, 0, 0.006),
            {},
            "Slow operators limit this run (1 of 1 rounds agree): 60% of the time is in operators that reach less than "
            f"{FAR:.0%} of the rate of a copy or a matrix product, most in aten::add_.",
        ),
        (
            times_of(0.01, 0.01, 0.004, 0.004, 0.002, 0),
            {"reached": {"compute": None, "memory": 0.7}},
            "The loader, compute and memory bandwidth limit this run about equally (1 of 1 rounds agree): the "
            "loader makes 10,000 images/s alone, the step could take 10,000; operators that mostly compute take 40% of "
            "the time; operators that mostly move data",
        ),
    ],
)  # fmt: skip
def test_the_sentence_names_the_limit_the_figures_and_the_remedy(
    times: Times, changes: dict[str, Any], expected: str
) -> None:
    assert expected in sentence(verdict_of(times, [times]), evidence_of(times, **changes))


def test_settings_that_auto_would_choose_otherwise_are_remedies() -> None:
    config = parse(["--recipe", "digits", "--engine.device=cpu", "--engine.channels_last=false", "--model.norm=torch"])
    found = better_choices(config, resolve_engine(config))
    assert found["engine.channels_last"] == "--engine.channels_last true"
    assert "engine.precision" not in found and "engine.compile" not in found  # auto's already
    config = parse(["--recipe", "digits", "--engine.device=cpu"])
    assert better_choices(config, resolve_engine(config)) == {}


# ---- the parts


def test_operators_are_divided_by_their_side_of_the_roofline() -> None:
    def operator(name: str, seconds: float, flops: float | None, moved: float | None) -> Operator:
        return Operator(name=name, calls=1, seconds=seconds, share=0, flops=flops, bytes=moved, kernel=None)

    operators = [
        operator("conv", 2, 100, 10),  # half of the compute roof
        operator("relu", 1, 0, 80),  # four fifths of the memory roof
        operator("tiny conv", 1, 1, 1),
        operator("third-party", 0.5, None, None),
        operator("cpp_fused_add_3", 1.5, None, None),
    ]
    work = work_of(operators, span_s=8, launches=5, flops_per_s=100, bytes_per_s=100)
    assert work.seconds == {"compute": 2, "memory": 2.5, "slow": 1.5} and work.slowest == "tiny conv"
    assert work.reached == {"compute": pytest.approx(0.5), "memory": pytest.approx(0.8)}
    shares = work.shares(step_s=4)  # a traced step takes twice as long
    assert shares == {"compute": 2 / 8, "memory": 2.5 / 8, "slow": 1.5 / 8, "launches": 2 / 8}
    assert replace(work, span_s=None).shares(step_s=12)["launches"] == pytest.approx(0.5)  # on a GPU
    assert replace(work, span_s=None).shares(step_s=4)["launches"] == 0  # kernels of two streams
    assert sum(work.shares(step_s=4).values()) == pytest.approx(1)


class Counted:
    """A loader that yields its steps, and knows how far it was asked and whether it was closed."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.closed = 0

    def train(self, first: int, last: int) -> Iterator[int]:
        self.asked.append((first, last))
        try:
            yield from range(first, last)
        finally:
            self.closed += 1


def test_a_loader_starts_anew_and_after_the_samples_that_it_has_read() -> None:
    feed, loader = Feed(ahead=2), Counted()
    feed.start(loader, 3)
    assert list(feed.batches) == [(2, 2), (3, 3), (4, 4)] and loader.closed == 0
    feed.start(loader, 2)
    assert loader.closed == 1 and next(feed.batches) == (7, 7)
    feed.close()
    assert loader.asked == [(0, 5), (5, 9)] and loader.closed == 2 and list(feed.batches) == []


def test_a_synthetic_batch_has_the_runs_shapes_and_strides() -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    made, labels = synthetic_batch((images, torch.zeros(4, dtype=torch.int64)))
    assert made.shape == images.shape and made.dtype == images.dtype and made.stride() == images.stride()
    assert made.float().std() > 0.5 and labels.dtype == torch.int64
    _, shares = synthetic_batch((images, torch.zeros(4, 5)))
    assert torch.allclose(shares.sum(dim=1), torch.ones(4))


# ---- real runs


def measured(*flags: str, cuda_graph: bool = False) -> Limits:
    """Measure a run in fp32 with torch's operators, in rounds as short as possible."""
    config, recorder = parse([*flags]), OpRecorder(torch.device("cpu")) if cuda_graph else None
    return measure_limits(config, engine(cuda_graph=cuda_graph), lambda line: None, region_s=0.02, recorder=recorder)


def shown(limits: Limits) -> str:
    show(limits, Console(file=(out := StringIO()), width=140))
    return out.getvalue()


@pytest.mark.slow
def test_large_jpegs_and_one_worker_limit_a_small_network(tmp_path: Path) -> None:
    write_image_folder(tmp_path, size=1000, train=2, test=1)
    limits = measured(
        *("--data.source=imagefolder", f"--data.root={tmp_path}", "--data.loader=dataloader", "--data.workers=1"),
        *("--data.augment=resized_crop", "--data.image_size=16", "--model.name=resnet8", "--train.batch_size=2"),
    )
    assert limits.verdict.limits == ("loader",)
    assert "The loader limits this run" in shown(limits)


@pytest.mark.slow
def test_convolutions_limit_a_large_network_with_small_data() -> None:
    limits = measured(
        *("--data.source=synthetic", "--data.synthetic_samples=16", "--train.batch_size=8", "--data.image_size=32"),
        *("--model.name=resnet18", "--model.options.stem=small"),
    )
    assert limits.verdict.limits == ("compute",)
    text = shown(limits)
    assert "Compute limits this run" in text and "of a matrix product's rate" in text
    assert sum(limits.median.share(part) for part in ("compute", "memory", "launches", "slow")) <= 1.0001


def test_a_captured_step_is_measured_with_its_own_batches_and_with_a_fixed_one() -> None:
    """On a CPU the engine itself rejects a graph, and OpRecorder replays the step's operators."""
    limits = measured(
        *("--data.source=synthetic", "--data.synthetic_samples=64", "--data.image_size=8", "--train.batch_size=4"),
        "--model.name=resnet8",
        cuda_graph=True,
    )
    assert limits.captured and {name: timing.n for name, timing in limits.timings.items()} == {
        "run": 5, "step": 5, "loader": 5
    }  # fmt: skip
    assert limits.work.launches > 50 and "loader" not in limits.verdict.limits


# ---- the command


@pytest.mark.slow
def test_the_command_prints_a_table_and_a_sentence_and_writes_nothing(tmp_path: Path) -> None:
    ran = run_fastres("profile", "--recipe", "digits", "--limits", "--model.name", "resnet8", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "resnet8 in " in ran.stdout and "│ without the loader " in ran.stdout and " Remedy: " in ran.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--limits --optim.lrr 1", "unknown flag --optim.lrr (did you mean --optim.lr?)"),
        ("--batch-size 4 --limits", "unknown flag --batch"),
        ("--recipe digist --limits", "unknown recipe 'digist'"),
    ],
)
def test_with_limits_the_other_flags_and_their_errors_are_trains(flags: str, line: str) -> None:
    with pytest.raises(UsageError) as rejected:
        profile.main(flags.split())
    assert line in str(rejected.value)


def test_several_processes_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="measures one process; start it without torchrun"):
        profile.main(["--limits", "--recipe", "digits"])
