"""Whole steps as recordings: a replay is bitwise identical to the step, and unsuitable work is rejected.

On a CPU, OpRecorder stands in for CudaRecorder, with a CUDA graph's rules. CudaRecorder has not yet run on a GPU.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.config.cli import parse
from fastres.data.loaders.build import build_loader
from fastres.data.loaders.resident import ResidentLoader
from fastres.data.sources.load import load_source
from fastres.distributed.process_group import ProcessGroup
from fastres.models.registry import build_model
from fastres.runs import checkpoint
from fastres.testing import op_recorder
from fastres.testing.op_recorder import OpRecorder
from fastres.train import train
from fastres.training import cuda_graph
from fastres.training.cuda_graph import (
    CannotRecord,
    DeviceTable,
    GraphedEvaluation,
    GraphedStep,
    Recording,
    capture_if_enabled,
)
from fastres.training.engine import Engine, cuda_graph_support, resolve_engine
from fastres.training.evaluator import Evaluator
from fastres.training.signals import StopSignal
from fastres.training.step import TrainStep
from fastres.utils.errors import RunError
from tests.commands import run_fastres
from tests.fixtures import rejected

CPU = torch.device("cpu")
# Epochs of 22.5 steps and blocks of 7 end at no evaluation and no checkpoint, and the last block has 2 steps.
BLOCK = 7
SHORT = ("--recipe digits --model.name resnet8 --model.norm torch --train.batch_size 64 --train.steps 30 "
         "--train.eval_every 13 --train.eval_batch_size 100 --train.log_every 1 --schedule.warmup_steps 10 "
         "--engine.precision fp32 --run.checkpoint_every 8 --run.keep_checkpoints 9").split()  # fmt: skip


@pytest.fixture(autouse=True)
def _short_blocks_recorded_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "BLOCK_STEPS", BLOCK)
    monkeypatch.setattr(cuda_graph, "CudaRecorder", OpRecorder)


def run(folder: Path, *flags: object, graphed: bool) -> Path:
    """Train and return the run's folder. The engine rejects graphs on a CPU, so its answer is replaced."""
    config = parse([*SHORT, *map(str, flags), "--run.dir", str(folder)])
    engine = replace(resolve_engine(config), cuda_graph=graphed, cuda_graph_may_fall_back=False)
    engine.apply_torch_settings()
    assert train(config, engine, ProcessGroup(), StopSignal()) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return every row of the run without its times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "train_time_s")} for row in rows]


def states(folder: Path, first: int = 0) -> dict[str, str]:
    """Return a hash of weights, statistics, momentum, loss scale and metrics per checkpoint from step `first` on."""
    contents = {path.name: checkpoint.load(path) for path in checkpoint.found(folder / "checkpoints")}
    return {
        name: checkpoint.digest({"trainer": content["trainer"], "window": content["window"]})
        for name, content in contents.items()
        if content["step"] >= first
    }


# ---- a run that is replayed ---------------------------------------------------------------------------------

RUNS = {
    "as it is": "",
    "three channels": "--data.source synthetic --data.synthetic_samples 300 --data.image_size 12",
    "in parts": "--train.accumulate 2 --train.label_smoothing 0.1",
    "bf16": "--engine.precision bf16 --engine.conv torch",
    "bf16 and C++ kernels, where they are": "--engine.precision bf16 --model.norm auto",
    "fp16": "--engine.precision fp16",
    "fp64, NCHW": "--engine.precision fp64 --engine.channels_last false",
    "three channels, NCHW": "--data.source synthetic --data.synthetic_samples 300 --data.image_size 12 "
                            "--engine.channels_last false",
    "nesterov, two rates": "--optim.nesterov true --optim.norm_bias_lr_scale 64",
    "no momentum": "--optim.momentum 0",
    "muon": "--optim.name muon --optim.nesterov true --optim.norm_bias_lr_scale 64",
    "muon in bf16": "--optim.name muon --engine.precision bf16 --model.norm auto",
    "no augmentation": "--data.augment none",
    "all augmentation": "--data.cutout 3 --data.mixup 0.3 --data.cutmix 0.5 --data.flip alternating "
                        "--data.pad_mode reflect --data.pad 2",
    "samples held out": "--data.validation 237",
    "speed_resnet": "--model.name speed_resnet --optim.norm_bias_lr_scale 64 --optim.nesterov true",
    "mini_resnet": "--model.name mini_resnet --train.batch_size 8",
    "resnet18": "--model.name resnet18 --model.options.stem small --train.batch_size 4 --train.steps 12",
    "a frozen backbone": "--model.freeze backbone --optim.weight_decay 0.1",
    "frozen stages, in parts": "--model.freeze [conv1,bn1,layer1] --train.accumulate 2 --train.steps 16",
    "more than an epoch a step": "--data.source synthetic --data.synthetic_samples 40 --data.image_size 8",
}  # fmt: skip
COSTLY = ("fp16", "resnet18", "fp64, NCHW")


@pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, id=name, marks=[pytest.mark.slow] * (name in COSTLY)) for name, flags in RUNS.items()],
)
def test_a_replayed_run_is_the_run_bit_for_bit(flags: str, tmp_path: Path) -> None:
    """Compare each step's loss, each evaluation, each checkpoint, and the weights at the end."""
    plain = run(tmp_path / "plain", *flags.split(), graphed=False)
    replayed = run(tmp_path / "replayed", *flags.split(), graphed=True)
    assert metrics(replayed) == metrics(plain) and len(metrics(plain)) > 9
    assert states(replayed) == states(plain) and len(states(plain)) >= 2
    ends = [(folder / "model.safetensors").read_bytes() for folder in (plain, replayed)]
    assert ends[0] == ends[1]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (plain, replayed)]
    assert [summary["cuda_graph"] for summary in summaries] == [False, True]


@pytest.mark.parametrize("step", [8, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_graphed_and_ungraphed_runs_resume_from_each_others_checkpoints(
    step: int, precision: str, tmp_path: Path
) -> None:
    flags = ("--engine.precision", precision)
    folders = {graphed: run(tmp_path / f"{graphed}", *flags, graphed=graphed) for graphed in (False, True)}
    for graphed, folder in folders.items():
        state = folder / f"checkpoints/step-{step:08}.pt"
        resumed = run(tmp_path / f"from-{graphed}", *flags, "--run.resume", state, graphed=not graphed)
        assert states(resumed, step + 1) == states(folder, step + 1)
        assert metrics(resumed) == [row for row in metrics(folder) if row["step"] > step]


def test_the_step_of_a_non_finite_loss_is_named(tmp_path: Path) -> None:
    reasons = []
    for graphed in (False, True):
        flags = ("--optim.lr", 1e30, "--train.log_every", 30, "--run.checkpoint_every", 100)
        with pytest.raises(RunError) as caught:
            run(tmp_path / f"{graphed}", *flags, "--train.eval_every", 30, graphed=graphed)
        reasons.append(str(caught.value).partition(";")[0])
    assert reasons[0] == reasons[1] and "the loss became non-finite at step " in reasons[0]
    assert 0 < int(reasons[0].rpartition(" ")[2]) < 29  # not the last step


# ---- a step that is replayed --------------------------------------------------------------------------------


def build(*flags: str, recordable: bool = True) -> tuple[TrainStep, ResidentLoader, Evaluator]:
    """Build the parts of a run as train() does."""
    config = parse([*SHORT, *flags])
    engine, source = resolve_engine(config), load_source(config.data)
    loader = build_loader(config, source, source.train, device=engine.device, dtype=engine.dtype)
    torch.manual_seed(0)
    model = engine.place(build_model("resnet8", in_channels=source.channels))
    if not recordable:
        model = nn.Sequential(model, Scaled())
    step = TrainStep(model, engine, config.optim)
    return step, loader, Evaluator(model, engine, len(source.classes))


class Scaled(nn.Module):
    """A layer after the logits that reads their magnitude on the host."""

    def forward(self, x: Tensor) -> Tensor:
        return x / max(1.0, x.abs().max().item())


def lr_at(step: int) -> float:
    return 0.1 / (step + 1)


def run_steps(step: TrainStep | GraphedStep, loader: Any, first: int, last: int) -> None:
    for i, batch in enumerate(loader.train(first, last), first):
        step(*batch, lr_at(i), i)


def graphed_step(step: TrainStep, loader: ResidentLoader) -> GraphedStep:
    return GraphedStep(step, loader, lr_at, OpRecorder(CPU))


def test_the_learning_rate_is_the_steps_own_in_every_group() -> None:
    step, loader, _ = build("--optim.norm_bias_lr_scale", "64")
    replayed = graphed_step(step, loader)
    for i, batch in enumerate(replayed.train(0, 2 * BLOCK)):
        replayed(*batch, lr_at(i), i)
        for rate, scale in zip(step.learning_rates, (1, 64), strict=True):
            assert torch.equal(rate, torch.zeros(()).fill_(lr_at(i) * scale)), i


def test_a_recording_keeps_python_numbers() -> None:
    """So a recording of TrainStep's own call would keep its first learning rate."""
    step, loader, _ = build()
    batch, lr = next(loader.train(0, 1)), [0.5]
    recording = OpRecorder(CPU).record(lambda: step(*batch, lr[0], 0), step.mutated_tensors)
    lr[0] = 0.25
    recording.replay()
    assert step.lr == 0.5


FEW = ("--train.batch_size", "8", "--train.eval_batch_size", "8")  # convolutions in fp16 take a CPU long


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_recording_leaves_no_trace(precision: str) -> None:
    flags = ("--engine.precision", precision, *FEW)
    step, loader, evaluate = build(*flags)
    run_steps(step, loader, 0, 3)
    before = checkpoint.digest(step.state_dict())
    graphed_step(step, loader)
    GraphedEvaluation(evaluate, loader, OpRecorder(CPU))
    assert checkpoint.digest(step.state_dict()) == before
    assert all(p.grad is None for p in step.model.parameters())
    run_steps(step, loader, 3, 5)  # and a step without the recording still works
    (expected, *_), again = build(*flags), loader
    run_steps(expected, again, 0, 5)
    assert checkpoint.digest(step.state_dict()) == checkpoint.digest(expected.state_dict())


def test_a_recorded_step_continues_from_a_state_that_is_loaded_later() -> None:
    step, loader, _ = build("--engine.precision", "fp16", *FEW)
    replayed = graphed_step(step, loader)
    run_steps(replayed, replayed, 0, 9)
    state = copy.deepcopy(step.state_dict())
    run_steps(replayed, replayed, 9, 15)
    ended = checkpoint.digest(step.state_dict())
    step.load_state_dict(state)
    run_steps(replayed, replayed, 9, 15)
    assert checkpoint.digest(step.state_dict()) == ended


@pytest.mark.slow
def test_an_overflow_in_the_very_first_fp16_step_is_skipped_and_halves_the_scale() -> None:
    weights = []
    for record in (False, True):
        step, loader, _ = build("--engine.precision", "fp16")
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        before = copy.deepcopy(list(step.model.parameters()))
        steps = graphed_step(step, loader) if record else step
        batches = steps if isinstance(steps, GraphedStep) else loader
        run_steps(steps, batches, 0, 1)
        assert step.scaler.get_scale() == 2.0**39
        assert all(torch.equal(p, q) for p, q in zip(step.model.parameters(), before, strict=True))
        run_steps(steps, batches, 1, 40)  # until some steps have run
        assert step.scaler.get_scale() < 2.0**20
        assert not torch.equal(before[0], next(step.model.parameters()))
        weights.append(checkpoint.digest(step.state_dict()))
    assert weights[0] == weights[1]


def test_steps_are_taken_in_their_order_each_once() -> None:
    step, loader, _ = build()
    replayed = graphed_step(step, loader)
    with pytest.raises(
        ValueError, match=r"step 0 at learning rate 0\.1 is not the step that train\(\) prepared: step None"
    ):
        replayed(lr_at(0), 0)
    batches = replayed.train(0, 3)
    next(batches)
    with pytest.raises(ValueError, match=r"is not the step that train\(\) prepared: step 0"):
        replayed(lr_at(1), 1)
    next(replayed.train(5, 9))
    with pytest.raises(ValueError, match=r"step 5 at learning rate 1\.0 is not"):
        replayed(1.0, 5)


def test_a_replay_runs_no_python_of_the_step_and_no_new_memory() -> None:
    step, loader, _ = build()
    replayed = graphed_step(step, loader)
    total_bytes = replayed.recording.total_bytes
    forward = step.model.forward
    step.model.forward = None  # type: ignore[method-assign]
    run_steps(replayed, replayed, 0, 2 * BLOCK)
    assert replayed.recording.total_bytes == replayed.recording.count_bytes() == total_bytes
    step.model.forward = forward  # type: ignore[method-assign]
    expected, *_ = build()
    run_steps(expected, loader, 0, 2 * BLOCK)
    assert checkpoint.digest(step.state_dict()) == checkpoint.digest(expected.state_dict())


def test_a_replayed_evaluation_uses_the_present_weights() -> None:
    step, loader, evaluate = build()
    replayed = GraphedEvaluation(evaluate, loader, OpRecorder(CPU))  # 15 batches of 100, of which the last is padded
    seen = []
    for i in range(3):
        metrics = evaluate(replayed.evaluate())
        assert metrics == evaluate(loader.evaluate()) and metrics.samples == 1437
        seen.append(metrics.loss)
        run_steps(step, loader, i, i + 1)
    assert len(set(seen)) == 3


class Again:
    """A recorder whose replay repeats the work, because no CPU recorder sees code that inductor compiled."""

    def record(self, work: Any, mutated: Any) -> Any:
        return SimpleNamespace(replay=work)


@pytest.mark.parametrize(
    "flags",
    [
        "--engine.precision bf16",
        f"{RUNS['three channels']} --data.cutout 3 --data.flip alternating --data.pad_mode reflect --data.pad 2",
        f"{RUNS['three channels']} --data.mixup 0.3 --data.cutmix 0.5",  # its batch is not compiled
    ],
)
@pytest.mark.slow
def test_the_compiled_work_around_the_network_is_bitwise_that_of_eager(flags: str) -> None:
    torch._dynamo.reset()
    compiling = "--engine.compile", "true", "--optim.norm_bias_lr_scale", "64"
    (step, loader, _), (other, *_) = (build(*flags.split(), *compiling) for _ in range(2))
    for of in (step, other):
        of.warm_up(*next(loader.train(0, 1)))
        assert all(not tensor.any() for tensor in of.metrics.tensors[:3])
    replayed = GraphedStep(step, loader, lr_at, Again())
    # The batch with its rates, and the metrics, compile besides the network.
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_steps(replayed, replayed, 0, 2 * BLOCK + 2)
    assert (replayed._read == replayed.read_row) == ("mixup" in flags)
    other.add_to_metrics = other._add_to_metrics
    run_steps(other, loader, 0, 2 * BLOCK + 2)
    assert checkpoint.digest(step.state_dict()) == checkpoint.digest(other.state_dict())
    assert other.metrics.step == 2 * BLOCK + 1 and other.metrics.bad_step == -1
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_next_run_in_a_process_compiles_nothing_anew() -> None:
    """Otherwise the ninth run would be rejected, because fullgraph allows eight versions of a function."""
    torch._dynamo.reset()
    seen = []
    for recompiles_are_errors in (False, True):
        step, loader, evaluate = build("--engine.compile", "true", "--optim.norm_bias_lr_scale", "64")
        with torch._dynamo.config.patch(error_on_recompile=recompiles_are_errors):
            step.warm_up(*next(loader.train(0, 1)))
            replayed = GraphedStep(step, loader, lr_at, Again())
            run_steps(replayed, replayed, 0, 2)
            evaluate(loader.evaluate())
        seen.append(checkpoint.digest(step.state_dict()))
    assert seen[0] == seen[1]
    torch._dynamo.reset()


@pytest.mark.parametrize("flags", ["", RUNS["all augmentation"]])
def test_the_images_of_a_single_step_are_those_of_a_block(flags: str) -> None:
    _, loader, _ = build(*flags.split())
    drawn = loader.draws(20, 27)
    for k, (images, labels) in enumerate(loader.train(20, 27)):  # an epoch ends within this block
        mine, shares = loader.batch({name: values[k] for name, values in drawn.items()})
        assert torch.equal(mine, images) and torch.equal(shares, labels)
        assert mine.is_contiguous(memory_format=torch.channels_last)


def test_a_table_is_read_row_by_row_from_fixed_memory() -> None:
    table = DeviceTable({"a": torch.zeros(0, 2)}, 3, CPU)
    taken = torch.zeros(2)
    recording = OpRecorder(CPU).record(lambda: taken.copy_(table.next_row()["a"]), [taken, *table.mutated_tensors])
    for rows in (torch.arange(6.0).reshape(3, 2), torch.full((2, 2), 7.0), torch.full((1, 2), 8.0)):
        table.fill({"a": rows})
        for row in rows:
            recording.replay()
            assert torch.equal(taken, row)


# ---- work that cannot be recorded --------------------------------------------------------------------------------

SCALE, MASK = torch.tensor(3.0), torch.tensor([True, False, True, True])
REFUSED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "a number read": (lambda x: x * x.sum().item(), "aten._local_scalar_dense.default synchronises the host"),
    "a truth read": (lambda x: x if x.sum() > 0 else -x, "aten._local_scalar_dense.default synchronises the host"),
    "a comparison": (lambda x: torch.equal(x, x + 1), "aten.equal.default synchronises the host"),
    "a list": (lambda x: x.tolist(), "Tensor.tolist synchronises the host"),
    "an array": (lambda x: x.numpy(), "Tensor.numpy synchronises the host"),
    "something printed": (lambda x: f"{x!r}", "Tensor.__repr__ synchronises the host"),
    "places of non-zeros": (lambda x: x.nonzero(), "aten.nonzero.default synchronises the host"),
    "a selection": (lambda x: x.masked_select(MASK), "aten.masked_select.default synchronises the host"),
    "a mask": (lambda x: x[MASK], "aten.index.Tensor synchronises the host"),
    "what is unique": (lambda x: x.unique(), "synchronises the host"),
    "classes checked": (lambda x: F.one_hot(x.long()), "synchronises the host"),
    "numbers from the host": (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), "made from numbers on the host"),
    "another device": (lambda x: x.to("meta"), "from or to another device than cpu"),
    "randomness": (lambda x: x + torch.rand(4), "draws random numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("work", "why"), REFUSED.values(), ids=REFUSED)
def test_synchronising_or_copying_from_the_host_is_refused_by_name_and_place(
    work: Callable[[Tensor], object], why: str
) -> None:
    x = torch.ones(4)
    with pytest.raises(CannotRecord) as caught:
        OpRecorder(CPU).record(lambda: work(x), [])
    assert why in str(caught.value) and f"({__name__}, line " in str(caught.value)


def test_memory_that_grows_is_refused() -> None:
    x, losses = torch.ones(4), list[Tensor]()
    with pytest.raises(CannotRecord, match="the work keeps 16 more bytes at each call"):
        OpRecorder(CPU).record(lambda: losses.append(x * 2), [])


def test_a_live_autograd_graph_is_refused() -> None:
    """On a GPU, its accumulators would pull the stream on which they were made into the capture."""
    weight = torch.ones(4, requires_grad=True)

    def work() -> None:
        (weight * 2).sum().backward()
        weight.grad = None

    loss = (weight * 2).sum()
    with pytest.raises(CannotRecord, match="1 parameters still belong to a live autograd graph"):
        OpRecorder(CPU).record(work, [weight])
    del loss
    OpRecorder(CPU).record(work, [weight])


def test_outputs_of_a_recording_are_rewritten_in_place() -> None:
    """A CUDA graph does the same for a gradient or an output."""
    x, out = torch.ones(4), dict[str, Tensor]()
    recording = OpRecorder(CPU).record(lambda: out.update(doubled=x * 2), [])
    held = out["doubled"]
    x.fill_(5)
    recording.replay()
    assert out["doubled"] is held and torch.equal(held, torch.full((4,), 10.0))


def test_an_undeclared_write_is_refused() -> None:
    x, kept = torch.ones(4), torch.zeros(4)
    with pytest.raises(CannotRecord, match=r"the work writes to a tensor \(4,\) that is not among the mutated"):
        OpRecorder(CPU).record(lambda: kept.add_(x), [])
    norm = nn.BatchNorm2d(2)  # its operator does not declare its writes
    with pytest.raises(CannotRecord, match="not among the mutated tensors"):
        OpRecorder(CPU).record(lambda: norm(torch.ones(2, 2, 2, 2)), [])
    OpRecorder(CPU).record(lambda: norm(torch.ones(2, 2, 2, 2)), [*norm.buffers()])


def test_state_that_is_made_at_the_first_step_is_refused() -> None:
    """Its first values would come from the warm-up."""
    weight, grad = torch.ones(4), torch.ones(4)
    state = dict[str, Tensor]()

    def work() -> None:
        state.setdefault("momentum", torch.zeros(4)).add_(grad)
        weight.sub_(state["momentum"])

    with pytest.raises(CannotRecord, match="not among the mutated tensors"):
        OpRecorder(CPU).record(work, [weight])


def test_memory_that_moves_is_noticed_at_the_replay() -> None:
    x, out = torch.ones(4), torch.zeros(4)
    recording: Recording = OpRecorder(CPU).record(lambda: out.copy_(x * 2), [out])
    x.resize_(1000)
    with pytest.raises(CannotRecord, match="a replay changed the memory it uses"):
        recording.replay()


# ---- the engine's decision ----------------------------------------------------------------------------


def engine_of(*flags: str) -> Engine:
    return resolve_engine(parse([*SHORT, *flags]))


def test_a_cpu_has_no_graphs_and_says_why() -> None:
    engine = engine_of()
    assert not engine.cuda_graph
    assert "cuda_graph: false (CUDA graphs are for GPUs)" in engine.reasons
    assert not any("cuda_graph" in line for line in engine_of("--engine.cuda_graph", "false").reasons)
    with rejected("engine.cuda_graph true: CUDA graphs are for GPUs; set it to auto"):
        engine_of("--engine.cuda_graph", "true")


def test_the_command_refuses_in_one_line_and_auto_prints_its_reason(tmp_path: Path) -> None:
    done = run_fastres("train", *SHORT, "--engine.device", "cpu", "--engine.cuda_graph", "true", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "fastres: error: engine.cuda_graph true: CUDA graphs are for GPUs; set it to auto\n"
    assert list(tmp_path.iterdir()) == []
    done = run_fastres(
        "train", *SHORT, "--train.steps", "0", "--schedule.warmup_steps", "0", "--run.dir", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert "cuda_graph: false (CUDA graphs are for GPUs)" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("flags", "world_size", "why", "remedy"),
    [
        ("", "1", None, ""),
        ("", "2", "2 processes exchange gradients in every step, which is not captured", "set it to auto"),
        ("--data.loader dataloader", "1", "the batches of data.loader dataloader are made outside of the step",
         "use --data.loader resident"),
        ("--data.loader dali", "1", "the batches of data.loader dali", "use --data.loader resident"),
        ("--optim.name apex_sgd", "1", "apex_sgd reads the learning rate on the host", "use --optim.name sgd"),
    ],
)  # fmt: skip
def test_cuda_graphs_on_a_gpu_need_these_settings(
    monkeypatch: pytest.MonkeyPatch, flags: str, world_size: str, why: str | None, remedy: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    found, reason, todo = cuda_graph_support(parse([*SHORT, *flags.split()]), torch.device("cuda"))
    assert found == (why is None)
    assert (why or "the data set is on the GPU") in reason and remedy in todo


@pytest.mark.parametrize("asked_for", [True, False])
def test_a_step_that_cannot_be_recorded_runs_without_a_graph_unless_graphs_were_requested(asked_for: bool) -> None:
    step, loader, evaluate = build(recordable=False)
    step.engine = replace(step.engine, cuda_graph=True, cuda_graph_may_fall_back=not asked_for)
    before, said = checkpoint.digest(step.state_dict()), list[str]()
    why = "aten._local_scalar_dense.default synchronises the host with the device (tests.test_cuda_graph, line "
    if asked_for:
        with pytest.raises(RunError) as caught:
            capture_if_enabled(step, evaluate, loader, loader, lr_at, said.append)
        line = str(caught.value)
        assert line.startswith("engine.cuda_graph true: ") and why in line and line.endswith("set it to auto")
        return
    taken, training, evaluation = capture_if_enabled(step, evaluate, loader, loader, lr_at, said.append)
    (line,) = said
    assert line.startswith("cuda_graph: false (") and why in line
    assert (taken, training, evaluation) == (step, loader, loader)
    assert checkpoint.digest(step.state_dict()) == before
    run_steps(taken, training, 0, 2)
    assert step.metrics.read()[0].samples == 2 * 64


def test_a_recording_that_ends_between_the_scalers_halves_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    step, loader, evaluate = build("--engine.precision", "fp16", *FEW)
    step.engine = replace(step.engine, cuda_graph=True, cuda_graph_may_fall_back=True)
    before, said = checkpoint.digest(step.state_dict()), list[str]()
    fine = op_recorder._why_not
    last = torch.ops.aten._amp_update_scale_.default  # after the update of the weights
    monkeypatch.setattr(op_recorder, "_why_not", lambda *call: "ends it" if call[0] is last else fine(*call))
    taken, training, _ = capture_if_enabled(step, evaluate, loader, loader, lr_at, said.append)
    assert "_amp_update_scale_" in said[0]
    assert checkpoint.digest(step.state_dict()) == before
    run_steps(taken, training, 0, 2)
    assert step.metrics.read()[0].samples == 2 * 8


def test_a_failed_capture_raises_the_error_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the end of a failed capture raises an error of its own."""

    @contextmanager
    def capture(*_: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    with pytest.raises(ValueError, match="the reason"), cuda_graph.capturing(None):
        raise ValueError("the reason")
    with pytest.raises(RuntimeError, match="a previous error"), cuda_graph.capturing(None):
        pass
