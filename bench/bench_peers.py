"""The engine beside what others use for the same: ResNet-50's training step at 224 px, and airbench's run to 90 %.

    pip install -e '.[bench,peers]'
    pytest bench/bench_peers.py --benchmark-only

Each peer runs as its authors run it, in turns with the engine, on the same data and device: torchvision's ResNet-50 in
a plain loop, and again as one would tune it by hand; timm's as its own benchmark has it (channels-last, autocast,
compiled on a GPU), without that benchmark's wait after every step. Of airbench the package from PyPI, cut to the
shortest length that averages 90 %: not yet run, it needs a GPU.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.bench_time_to_90 import GOAL, flags_of, warm_runs
from bench.steps import Net, Steps, compare, engine_for, engine_training, plain_training
from fastres.engine import resolve
from fastres.timing import seconds_of

GPU = torch.cuda.is_available()
RESNET50 = Net(name="resnet50", batch=256 if GPU else 8, side=224, classes=1_000)


def tuned_training(model: torch.nn.Module) -> Steps:
    """A loop in bf16 autocast and channels-last, compiled on a GPU, with torch's fused SGD."""
    config, engine = engine_for()
    model = model.to(engine.device, memory_format=torch.channels_last).train()
    forward: Any = torch.compile(model) if engine.compile else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    images, labels = RESNET50.batch_on(engine.device, torch.float32)
    images = images.to(memory_format=torch.channels_last)

    def steps(n: int) -> None:
        resolve(config)
        for _ in range(n):
            with torch.autocast(engine.device.type, torch.bfloat16):
                loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def torchvision_plain() -> Steps:
    from torchvision.models import resnet50

    return plain_training(RESNET50, resnet50())


def torchvision_tuned() -> Steps:
    from torchvision.models import resnet50

    return tuned_training(resnet50())


def timm_tuned() -> Steps:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[peers]'")
    return tuned_training(timm.create_model("resnet50"))


PEERS: dict[str, Callable[[], Steps]] = {
    "torchvision, plain loop": torchvision_plain,
    "torchvision, tuned by hand": torchvision_tuned,
    "timm": timm_tuned,
}


@pytest.mark.parametrize("peer", PEERS)
def bench_resnet50(benchmark: Any, peer: str) -> None:
    build = PEERS[peer]
    _, engine = engine_for()
    theirs = build()
    compare(
        benchmark,
        RESNET50,
        lambda: theirs,
        engine_training(RESNET50),
        training=True,
        precision=engine.precision,
        peer=peer,
    )


# ---- airbench ---------------------------------------------------------------------------------------------------

EPOCHS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.9)  # 9.9 is its own, for 94 %
TRIALS = 10  # of each length, until one averages 90 %


def bench_airbench(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if not GPU:
        pytest.skip("airbench needs a GPU")
    airbench = pytest.importorskip("airbench", reason="airbench is not installed: pip install -e '.[peers]'")
    flags, root = flags_of("cifar10", request.config), request.config.option.data_root
    device = torch.device("cuda")
    loader = airbench.CifarLoader(
        root, train=True, batch_size=1_024, aug={"flip": True, "translate": 2}, altflip=True
    )
    test = airbench.CifarLoader(root, train=False)

    def their_run(epochs: float) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            loader.epoch = 0
            return float(
                airbench.evaluate(airbench.train94(loader, epochs=epochs, verbose=False), test, tta_level=0)
            )

    with contextlib.redirect_stdout(io.StringIO()):
        airbench.warmup94(loader, verbose=False)
    lengths = ((e, statistics.mean(their_run(e) for _ in range(TRIALS))) for e in EPOCHS)
    epochs = next((e for e, accuracy in lengths if accuracy >= GOAL), EPOCHS[-1])
    our_run, seeds = warm_runs(flags, tmp_path), request.config.option.seeds
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []

    def one_of_theirs() -> None:
        accuracy: list[float] = []
        seconds = seconds_of(lambda: accuracy.append(their_run(epochs)), device)
        theirs.append((seconds, accuracy[0]))

    def one_of_ours() -> None:
        seconds, summary = our_run(len(ours))
        ours.append((seconds, summary["test_accuracy"]))

    benchmark.pedantic(one_of_ours, setup=one_of_theirs, rounds=seeds)
    of = {"fastres": ours, "airbench": theirs}
    benchmark.extra_info.update(
        peer="airbench",
        epochs=epochs,
        n=seeds,
        times_s={name: [seconds for seconds, _ in runs] for name, runs in of.items()},
        accuracies={name: [accuracy for _, accuracy in runs] for name, runs in of.items()},
        median_s={name: statistics.median(seconds for seconds, _ in runs) for name, runs in of.items()},
    )


def summary(infos: list[dict[str, Any]]) -> list[str]:
    lines = []
    for info in infos:
        if info["peer"] == "airbench":
            ours, theirs = (info["median_s"][name] for name in ("fastres", "airbench"))
            lines.append(
                f"{'airbench':<28} fastres {ours:.2f} s, airbench {theirs:.2f} s for {info['epochs']} epochs, "
                f"n={info['n']}"
            )
            continue
        low, high = info["images_per_s_20_80"]
        lines.append(
            f"{info['peer']:<28} fastres {info['images_per_s']:,.1f} images/s ({low:,.1f} to {high:,.1f})  "
            f"{info['ratio']:.2f} x the peer's {info['baseline_images_per_s']:,.1f}, n={info['n']}"
        )
    return lines
