"""`fastres profile` measures the available variants side by side and writes everything down."""

from __future__ import annotations

import csv
import gzip
import json
import math
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn import Module
from torch.utils.flop_counter import FlopCounterMode

from fastres import build_model, profile
from fastres.config.schema import Config, EngineConfig
from fastres.profiling import trace
from fastres.profiling.measure import Outcome, VariantRun, difference, measure, prepare, step_in_parts
from fastres.profiling.report import COLORS, bars_of, figure_of, plot, rows_of, show
from fastres.profiling.trace import PARTS, Operator, WorkCount, bound
from fastres.profiling.variants import ALL, REFERENCE, Variant, variants_named
from fastres.profiling.workloads import Workload, block_workload, model_workload, resolved
from fastres.testing.op_recorder import OpRecorder
from fastres.training.engine import can_compile, resolve_engine
from fastres.training.step import TrainStep
from fastres.utils.errors import RunError, UsageError
from fastres_kernels import Conv2d
from tests.commands import run_fastres

CPU = torch.device("cpu")
ASKED = ("nchw-fp32", "fp32-channels_last", "channels_last-bf16", "graph", "fused-nchw")
NAMES = ["eager-nchw-fp32", "eager-channels_last-fp32", "eager-channels_last-bf16"]


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def done(folder: Path) -> subprocess.CompletedProcess[str]:
    sizes = ("--model", "resnet8", "--batch-size", "4", "--rounds", "3", "--steps", "2")
    ran = run_fastres("profile", *sizes, "--output", "out", "--variants", *ASKED, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.fixture(scope="module")
def raw(done: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "profile.json").read_text(encoding="utf-8"))


def test_the_terminal_shows_every_variant_and_the_reason_for_missing_ones(
    done: subprocess.CompletedProcess[str],
) -> None:
    assert done.stderr == ""
    for name in NAMES:
        assert len([line for line in done.stdout.splitlines() if line.startswith(f"│ {name} ")]) == 3
    assert "aten::convolution_backward" in done.stdout
    assert "measured in this run: a copy moves" in done.stdout
    assert "unavailable: graph-nchw-fp32: engine.cuda_graph true: CUDA graphs are for GPUs" in done.stdout
    assert "unavailable: eager-fused-nchw-fp32: model.norm fused: the kernels take channels-last" in done.stdout


def test_the_raw_numbers_are_consistent(raw: dict[str, Any]) -> None:
    variants = raw["variants"]
    assert [each["variant"] for each in variants] == NAMES and raw["baseline"] == NAMES[0]
    assert set(raw["absent"]) == {"graph-nchw-fp32", "eager-fused-nchw-fp32"}
    assert raw["environment"]["device"] and "fastres.profile" in " ".join(raw["environment"]["command"])
    assert raw["hardware"]["before"]["host"]["cpus"] and raw["hardware"]["after"]["host"]["cpus"]
    assert raw["hardware"]["data_sheet"] is None
    measured = raw["hardware"]["measured"]
    assert measured["copy_bytes_per_s"] > 0 and set(measured["matmul_flops"]) == {"fp32", "bf16"}
    for each in variants:
        step, images = each["step"], 2 * 4
        assert step["n"] == len(step["seconds"]) == len(each["ratios"]) == 3
        assert each["images_per_s"] == pytest.approx(images / step["median_s"])
        assert each["ratio"] == pytest.approx(variants[0]["step"]["median_s"] / step["median_s"])
        assert each["gflop_per_s"] == pytest.approx(each["flops_per_step"] * 2 / step["median_s"] / 1e9)
        for part in PARTS:
            assert each["parts"][part]["n"] == 3 * 2  # without the warm-up
            assert each[f"{part}_ms"] == pytest.approx(1e3 * each["parts"][part]["median_s"]) and each[f"{part}_ms"] > 0
        assert each["share_of_peak"] is None and each["kernels_busy"] is None
        assert each["peak_mb"] > each["held_mb"] > 0
        assert sum(operator["share"] for operator in each["operators"]) == pytest.approx(1)
        assert each["launches"] == pytest.approx(sum(operator["calls"] for operator in each["operators"]))
    fp32, bf16 = variants[1], variants[2]
    assert bf16["bytes_per_step"] < fp32["bytes_per_step"] and bf16["step_peak_bytes"] < fp32["step_peak_bytes"]


def test_the_counted_work_is_the_networks(raw: dict[str, Any]) -> None:
    model, images = build_model("resnet8"), torch.randn(4, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    for each in raw["variants"]:
        assert each["flops_per_step"] == counter.get_total_flops()
        by_name = {operator["name"]: operator for operator in each["operators"]}
        convolutions = by_name["aten::convolution"]
        assert convolutions["calls"] == 7 and convolutions["bound"] in ("compute", "memory")
        assert convolutions["flops"] == counter.get_flop_counts()["Global"][torch.ops.aten.convolution]


def test_differences_to_eager_fp32_are_small_and_recorded(raw: dict[str, Any]) -> None:
    same, channels_last, bf16 = (each["difference"] for each in raw["variants"])
    assert same["logits"] == same["gradients"] == 0
    assert same["logits_reference"] > 0.1 and same["gradients_reference"] > 0.01
    for what in ("logits", "gradients"):
        largest = same[f"{what}_reference"]
        assert channels_last[what] < 0.01 * largest  # sums have another order
        assert max(channels_last[what], 1e-4 * largest) < bf16[what] < 0.3 * largest


def test_the_csv_has_a_row_for_each(raw: dict[str, Any], folder: Path) -> None:
    with (folder / "out" / "profile.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == NAMES
    for row, each in zip(rows, raw["variants"], strict=True):
        assert float(row["images_per_s"]) == each["images_per_s"]
        assert row["share_of_peak"] == ""  # not known


def test_the_picture_is_not_blank(raw: dict[str, Any], folder: Path) -> None:
    with Image.open(folder / "out" / "profile.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        colors = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert colors is not None
    drawn = {color for _, color in colors}
    parts = {tuple(bytes.fromhex(COLORS[part].removeprefix("#"))) for part in PARTS}
    assert len(parts) == 3 and parts <= drawn


def test_traces_have_the_ranges_of_each_step(raw: dict[str, Any], folder: Path) -> None:
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(
        ["profile.csv", "profile.json", "profile.png", *(f"trace-{name}.json.gz" for name in NAMES)]
    )
    for each in raw["variants"]:
        (name,) = each["files"]
        with gzip.open(folder / "out" / name, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in PARTS]
        ranges.sort(key=lambda e: e["ts"])
        assert [e["name"] for e in ranges] == list(PARTS) * raw["traced_steps"]


@pytest.mark.slow
def test_a_compiled_block_is_compiled_once_and_its_kernels_have_names(tmp_path: Path) -> None:
    found, why = can_compile(CPU)
    if not found:
        pytest.skip(why)
    sizes = ("--channels", "8", "--size", "8", "--batch-size", "4", "--rounds", "1", "--steps", "1")
    variants = ("nchw", "compile-channels_last-bf16")
    ran = run_fastres("profile", "--block", "basic", *sizes, "--no-trace", "--variants", *variants, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    out = tmp_path / "profiles" / "basic-8x8"
    assert sorted(path.name for path in out.iterdir()) == ["profile.csv", "profile.json", "profile.png"]
    eager, compiled = json.loads((out / "profile.json").read_text(encoding="utf-8"))["variants"]
    generated = [o for o in compiled["operators"] if "cpp_fused" in o["name"]]
    assert generated and all(o["calls"] == 1 and o["bound"] == "unknown" for o in generated)
    assert compiled["bytes_per_step"] is None and compiled["gb_per_s"] is None
    assert compiled["launches"] < eager["launches"]
    assert compiled["flops_per_step"] == eager["flops_per_step"]
    backward = next(o for o in compiled["operators"] if o["name"] == "aten::convolution_backward")
    assert backward["calls"] == 2 and backward["flops"] == 2 * eager["flops_per_step"] / 3  # the input's too
    assert 0 < compiled["difference"]["gradients"] < 0.3 * eager["difference"]["gradients_reference"]


# ---- rejections


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--variants foo", "--variants foo: unknown word 'foo'; choose from eager, compile"),
        ("--variants compiled", "did you mean 'compile'"),
        ("--variants bf16-fp32", "bf16 and fp32 are both a precision; leave out one"),
        ("--variants tf33*", "no variant matches; names read like"),
        ("--variants tf32 graph", "all are unavailable here (eager-nchw-tf32: engine.precision tf32"),
        ("--model resnet21", "did you mean 'resnet20'"),
        ("--model resnet18 --options stem=large", "unknown stem 'large'; choose from imagenet, small"),
        ("--options stem", "'stem' is not NAME=VALUE, such as stem=small"),
        ("--model resnet20 --block basic", "not allowed with argument"),
        ("--block cubic", "invalid choice: 'cubic'"),
        ("--block bottleneck --channels 6", "--channels 6: must be a multiple of 4 for a bottleneck block"),
        ("--block basic --options stem=small", "--options belongs to --model"),
        ("--channels 16", "--channels belongs to --block"),
        ("--rounds 0", "argument --rounds: '0' is not a whole number above 0"),
        ("--batch-size many", "argument --batch-size: 'many' is not a whole number above 0"),
        ("--device tpu", "engine.device: 'tpu' is not auto, cpu, cuda or cuda:N"),
        ("--frobnicate", "unknown flag --frobnicate; --help lists all"),
        ("--model timm/resnet10tt", "unknown network of timm 'resnet10tt'; did you mean 'resnet10t'?"),
        ("--model nets:build", "--model: nets:build imports code; if you trust it, add --model.trust_code true"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(
    arguments: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        profile.main([*arguments.split(), "--device=cpu"] if "--device" not in arguments else arguments.split())
    assert line in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_one_line_and_exits_with_status_2(tmp_path: Path) -> None:
    ran = run_fastres("profile", "--rounds", "0", cwd=tmp_path)
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("fastres: error: argument --rounds")


def test_a_folder_that_holds_a_profile_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("resnet8", "resnet8-2", "resnet8-3"):
        folder = profile.folder_for(None, "resnet8")
        assert folder == Path("profiles") / expected
        (folder / "profile.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a profile already; choose another or remove it"):
        profile.folder_for(folder, "resnet8")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--output .*: cannot be written"):
        profile.folder_for(tmp_path / "file" / "out", "resnet8")


# ---- variants


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["eager"], ["eager-nchw-fp32"]),
        (["torch"], ["eager-nchw-fp32"]),
        (["eager-channels_last-bf16+fuse"], ["eager-fused-channels_last-bf16"]),
        (["bf16-channels_last-fused-compile"], ["compile-fused-channels_last-bf16"]),
        (["fp16", "bf16", "eager-fp16"], ["eager-nchw-fp16", "eager-nchw-bf16"]),  # in their order, each once
        (["[ec]*-apex-nchw-fp16"], ["eager-apex-nchw-fp16", "compile-apex-nchw-fp16"]),
        (["eager-torch-nchw-*"], [f"eager-nchw-{p}" for p in ("fp32", "tf32", "bf16", "fp16")]),
    ],
)  # fmt: skip
def test_patterns_select_variants_by_name(given: list[str], names: list[str]) -> None:
    assert [variant.name for variant in variants_named(given)] == names


def test_every_variant_has_a_unique_name_that_selects_it() -> None:
    assert len({variant.name for variant in ALL}) == len(ALL) == 3 * 3 * 2 * 4
    for variant in ALL:
        assert variants_named([variant.name]) == [variant]


def test_a_network_of_another_package_is_a_workload() -> None:
    workload = model_workload("timm/resnet10t", {"num_classes": 7}, 2, 32)
    assert workload.shape == (2, 3, 32, 32) and workload.classes == 7
    assert workload.build("torch").fc.weight.shape == (7, 512)


def test_a_variant_is_what_the_engine_makes_of_it() -> None:
    workload = model_workload("resnet8", {}, 2, None)
    (asked,) = variants_named(["compile-fused-channels_last-bf16"])
    engines, unavailable = resolved(workload, [asked], "cpu")
    engine = engines[asked]
    assert unavailable == {}
    assert (engine.compile, engine.norm, engine.channels_last, engine.precision) == (True, "fused", True, "bf16")


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes"),
    [
        ("resnet20", {}, (2, 3, 32, 32), 10),
        ("resnet18", {}, (2, 3, 224, 224), 1000),
        ("resnet18", {"stem": "small", "num_classes": 7}, (2, 3, 32, 32), 7),
        ("speed_resnet", {"in_channels": 1}, (2, 1, 32, 32), 10),
        ("mini_resnet", {}, (2, 1, 28, 28), 10),
        ("resnet8", {"in_channels": 1, "shortcut": "conv1x1"}, (2, 1, 32, 32), 10),
    ],
)
def test_a_network_has_the_data_of_its_family(
    name: str, options: dict[str, Any], shape: tuple[int, ...], classes: int
) -> None:
    workload = model_workload(name, options, 2, None)
    assert (workload.shape, workload.classes) == (shape, classes)
    with torch.device("meta"):
        assert workload.build("torch")(torch.empty(shape)).shape == (2, classes)
    assert model_workload(name, options, 2, 48).shape[2:] == (48, 48)


def test_fused_convolutions_are_for_the_fused_norm() -> None:
    workload = model_workload("resnet8", {"fused_convolutions": True}, 2, None)
    plain, fused = ({type(m) for m in workload.build(norm).modules()} for norm in ("torch", "fused"))
    assert plain != fused and Conv2d in plain


# ---- one variant


def test_a_step_in_parts_equals_the_whole_step() -> None:
    """They are bitwise identical, including the counters."""
    engine = resolve_engine(Config(engine=EngineConfig(precision="bf16", compile=False)))
    images = torch.randn(4, 3, 16, 16).to(torch.bfloat16, memory_format=torch.channels_last)
    labels = torch.randint(10, (4,))
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_model("resnet8").to(memory_format=torch.channels_last)
        steps.append(TrainStep(model, engine, Config().optim))
    whole, in_parts = steps
    in_parts.lr.fill_(0.1)
    entered: list[str] = []
    for i in range(3):
        whole(images, labels, 0.1, i)
        step_in_parts(in_parts, images, labels, lambda name: entered.append(name) or nullcontext())
    assert entered == list(PARTS) * 3
    first, second = (torch.utils._pytree.tree_flatten(step.state_dict())[0] for step in steps)
    assert len(first) == len(second)
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


def run_of(variant: str, workload: Any) -> VariantRun:
    (named,) = variants_named([variant])
    return VariantRun(workload, resolve_engine(named.config(workload.model, "cpu")))


def test_all_variants_start_from_the_same_weights() -> None:
    workload = model_workload("resnet8", {}, 2, 16)
    reference, other = (run_of(name, workload) for name in ("fp32", "fused-channels_last-bf16"))
    for name, weight in reference.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name])
    assert torch.equal(reference.images.bfloat16(), other.images) and torch.equal(reference.labels, other.labels)
    assert other.images.is_contiguous(memory_format=torch.channels_last)


def test_measuring_leaves_the_weights_and_gives_a_blocks_input_its_gradient() -> None:
    workload = block_workload("bottleneck", 8, 2, 4)
    run = run_of("fp32", workload)
    before = [weight.clone() for weight in run.model.parameters()]
    outcome = run.outcome()
    run.whole_steps(2)
    run.steps_in_parts(2, lambda name: nullcontext())
    for weight, was in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(weight, was)
    again = run.outcome()
    assert torch.equal(outcome.logits, again.logits)
    assert outcome.gradients.keys() == again.gradients.keys() == {
        *(name for name, _ in run.model.named_parameters()), "input"
    }  # fmt: skip
    assert all(torch.equal(outcome.gradients[n], again.gradients[n]) for n in outcome.gradients)
    assert run_of("fp32", model_workload("resnet8", {}, 2, 16)).outcome().gradients.keys().isdisjoint({"input"})


def test_fp16_has_finite_gradients_without_the_loss_scale() -> None:
    workload = block_workload("basic", 8, 2, 4)
    reference = run_of("fp32", workload).outcome()
    run = run_of("fp16", workload)
    run.step.scaler.scale(torch.ones(()))  # this creates the scaler's state
    run.step.scaler.update(2.0**40)  # far beyond fp16's range
    differs = difference(run.outcome(), reference)
    assert 0 < differs["gradients"] < 0.02 * differs["gradients_reference"]
    assert 0 < differs["logits"] < 0.02 * differs["logits_reference"]


def test_a_nan_is_not_hidden_by_finite_values() -> None:
    one, nan = torch.ones(2), torch.tensor([0.0, torch.nan])
    reference = Outcome(one, {"a": one, "b": one, "c": one})
    for name in "abc":
        broken = Outcome(nan, {**reference.gradients, name: nan})
        assert math.isnan(difference(broken, reference)["gradients"])
        assert math.isnan(difference(broken, reference)["logits"])


def test_a_variant_that_fails_leaves_the_others() -> None:
    workload = block_workload("basic", 8, 2, 4)
    broken = Variant("compile", "torch", "nchw", "fp32")
    (engine,) = resolved(workload, [REFERENCE], "cpu")[0].values()
    engines = {broken: replace(engine, norm="broken"), REFERENCE: engine}
    said: list[str] = []

    def failing(error: Exception) -> Workload:
        def build(norm: str) -> Module:
            if norm == "broken":
                raise error
            return workload.build(norm)

        return replace(workload, build=build)

    unavailable: dict[str, str] = {}
    ready = prepare(failing(RuntimeError("no such compiler\nand more")), engines, unavailable, said.append)
    assert list(ready) == [REFERENCE.name]
    assert unavailable == {broken.name: "failed: RuntimeError: no such compiler"}
    assert len(said) == 1 and said[0].startswith(f"{REFERENCE.name}: ready after")
    with pytest.raises(RunError, match="compile-nchw-fp32: failed: MemoryError"):
        prepare(failing(MemoryError()), {broken: engines[broken]}, {}, said.append)


@pytest.mark.parametrize("kind", ["network", "block"])
def test_a_replayed_step_is_timed_as_a_whole(kind: str, tmp_path: Path) -> None:
    workload = model_workload("resnet8", {}, 2, 8) if kind == "network" else block_workload("basic", 8, 2, 4)
    graph = Variant("graph", "torch", "channels_last", "fp32")
    plain = Variant("eager", "torch", "channels_last", "fp32")
    engine = resolve_engine(plain.config(workload.model, "cpu"))
    # On a CPU the engine itself rejects a graph.
    engines = {graph: replace(engine, cuda_graph=True), plain: engine}
    profile = measure(
        workload, engines, unavailable := {}, rounds=2, steps=2, folder=tmp_path, keep_traces=True,
        say=lambda line: None, recorder=OpRecorder(CPU),
    )  # fmt: skip
    assert not unavailable
    whole, parted = profile.results
    assert whole.parts == {} and set(parted.parts) == set(PARTS) and whole.peak_bytes is None
    assert whole.step.n == parted.step.n == 2 and whole.difference == parted.difference
    rows = rows_of(profile)
    assert rows[0]["forward_ms"] is None and rows[0]["steps_in_parts"] == 0 and rows[0]["step_ms"] > 0
    plot(profile, tmp_path / "profile.png")
    bars = bars_of(rows)
    assert bars["forward"][0] == 0 and bars["replay"] == [rows[0]["step_ms"], 0]
    # The longest bar is the slowest variant: bars are as long as the steps whose images/s stand beside them.
    assert [sum(parts) for parts in zip(*bars.values(), strict=True)] == pytest.approx([r["step_ms"] for r in rows])
    show(profile, Console(file=(out := StringIO()), width=140))
    line = next(line for line in out.getvalue().splitlines() if line.startswith(f"│ {graph.name} "))
    assert line.count("in one replay") == len(PARTS)


def test_a_disturbed_profile_is_marked_on_its_picture(tmp_path: Path) -> None:
    workload = block_workload("basic", 8, 2, 4)
    variant = Variant("eager", "torch", "channels_last", "fp32")
    engines = {variant: resolve_engine(variant.config(workload.model, "cpu"))}
    profile = measure(
        workload, engines, {}, rounds=1, steps=1, folder=tmp_path, keep_traces=False, say=lambda line: None
    )  # fmt: skip
    calm, busy = ({"host": profile.before["host"] | {"governor": name}, "gpu": None} for name in (None, "powersave"))
    undisturbed, disturbed = (
        figure_of(replace(profile, before=state, after=state)).axes[0].get_title() for state in (calm, busy)
    )
    assert undisturbed == "" and disturbed == "doubtful: the CPU's frequency governor is powersave"


# ---- work and traces


def test_flops_and_bytes_of_operators_are_counted() -> None:
    a, b = torch.randn(2, 100, 100)
    with WorkCount() as count:
        c = a @ b
        c.relu_()
        c.t().reshape(-1)[None]  # views, except one copy of a non-contiguous tensor
        torch.empty(1000)
        a[:1].expand(50, 100).sum()
        c.copy_(a)
    work = {key[0]: count.work[key] for key in count.calls}
    size = 4 * 100 * 100
    assert work["aten::mm"] == (2 * 100**3, 3 * size)
    assert work["aten::relu_"] == (0, 2 * size)
    assert work["aten::sum"][1] < size + 4 + 1  # the memory of one row, not of 50
    assert work["aten::copy_"] == (0, 2 * size)
    assert set(work) == {"aten::mm", "aten::relu_", "aten::clone", "aten::sum", "aten::copy_"}
    assert count.flops == 2 * 100**3 and count.bytes == sum(moved for _, moved in work.values())


def test_a_real_trace_is_summed_up_by_operator(tmp_path: Path) -> None:
    a, b = torch.randn(2, 100, 100)

    def step() -> None:
        (a @ b).relu_().view(-1)
        a @ b

    with WorkCount() as count:
        step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ) as profiler:
        for _ in range(4):
            step()
    path = tmp_path / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    events = trace.load(path)
    rows = {row.name: row for row in trace.operators(events, count.work, steps=4)}
    assert set(rows) == {"aten::mm", "aten::relu_"}
    assert (rows["aten::mm"].calls, rows["aten::relu_"].calls) == (2, 1)
    assert rows["aten::mm"].flops == 2 * 2 * 100**3 and rows["aten::mm"].bytes == 2 * 3 * 4 * 100**2
    assert sum(row.share for row in rows.values()) == pytest.approx(1)
    assert trace.launches(events, list(rows.values()), steps=4) == 3
    assert trace.kernel_seconds(events, steps=4) is None
    assert 4 * 100**2 <= trace.peak_bytes(events) <= 3 * 4 * 100**2  # type: ignore[operator]


def event(category: str, name: str, ts: float, dur: float, id_: int, **arguments: Any) -> trace.Event:
    tid = "stream 7" if category == "kernel" else 1
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": tid,
            "args": {"External id": id_, **arguments}}  # fmt: skip


def test_a_gpus_trace_is_summed_up_by_operator() -> None:
    """Kernels of this hand-written trace come later than the operators that launch them and carry their id."""
    x, w = [[8, 16, 32, 32], [16, 16, 3, 3]], ["c10::BFloat16"] * 2
    key = ("aten::convolution", ((8, 16, 32, 32), "c10::BFloat16"), ((16, 16, 3, 3), "c10::BFloat16"))
    triton, given = (
        "triton_poi_fused_relu_0",
        {"Input Dims": [[64], [64], []], "Input type": ["float", "float", "Scalar"]},
    )
    events = [
        event("user_annotation", "forward", 0, 500, 1),
        event("cpu_op", "aten::convolution", 10, 50, 2, **{"Input Dims": x, "Input type": w}),
        event("cpu_op", "aten::cudnn_convolution", 20, 30, 3, **{"Input Dims": x, "Input type": w}),
        event("cpu_op", triton, 100, 10, 4, **given),
        event("kernel", "transpose", 1000, 20, 3),
        event("kernel", "xmma", 1020, 60, 3),
        event("kernel", triton, 1080, 10, 4),
        event("kernel", "of a replayed graph", 1090, 10, 99),
    ]  # fmt: skip
    rows = trace.operators(events, {key: (1000, 200)}, steps=2)
    assert rows == [
        Operator(name="aten::convolution", calls=0.5, seconds=40e-6, share=0.8, flops=500, bytes=100, kernel="xmma"),
        Operator(name=triton, calls=0.5, seconds=5e-6, share=0.1, flops=0, bytes=256, kernel=triton),
        Operator(name="of a replayed graph", calls=0.5, seconds=5e-6, share=0.1, flops=None, bytes=None,
                 kernel="of a replayed graph"),
    ]  # fmt: skip
    assert trace.launches(events, rows, steps=2) == 2
    assert trace.kernel_seconds(events, steps=2) == pytest.approx(50e-6)
    assert trace.peak_bytes(events) is None


def test_flop_per_byte_tells_the_bound_of_an_operator() -> None:
    def operator(flops: float | None, moved: float | None) -> Operator:
        return Operator(name="op", calls=1, seconds=2.0, share=1.0, flops=flops, bytes=moved, kernel=None)

    # A device of 100 FLOP/s and 10 bytes/s is bound by compute from 10 FLOP/byte on.
    assert bound(operator(110, 10), 100, 10) == ("compute", 0.55)
    assert bound(operator(90, 10), 100, 10) == ("memory", 0.5)
    assert bound(operator(0, 40), 100, 10) == ("memory", 2.0)
    assert bound(operator(None, None), 100, 10) == ("unknown", None)


def test_the_intensity_of_an_operator_is_its_flop_per_byte() -> None:
    def operator(flops: float | None, moved: float | None) -> Operator:
        return Operator(name="op", calls=1, seconds=2.0, share=1.0, flops=flops, bytes=moved, kernel=None)

    assert operator(110, 10).intensity == 11
    assert operator(0, 40).intensity == 0
    assert operator(None, 40).intensity is operator(110, None).intensity is operator(0, 0).intensity is None
