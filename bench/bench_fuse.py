"""Measure what fastres.fuse brings to networks of fastres, torchvision and timm.

    pip install -e '.[bench,timm]'
    pytest bench/bench_fuse.py --benchmark-only           two networks, in training
    pytest bench/bench_fuse.py --benchmark-only --full    everything

The network as its library builds it, and the same network after fastres.fuse, run interleaved in the same loop.
"plain" is the loop of the tutorials: eager, fp32, NCHW. "tuned" is that loop with bf16 and channels-last.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bench.lib.paired import compare
from bench.lib.plain_loop import PlainLoop, loop_inference, loop_training, plain_engine
from bench.lib.workloads import GPU, Net, Steps
from fastres import fuse
from fastres.models.fusion.modules import FusedConv2d


def net(name: str, batch: int = 8, side: int = 224, classes: int = 1_000) -> Net:
    return Net(name=name, batch=256 if GPU else batch, side=side, classes=classes)


NETS = (
    net("resnet20", 128, 32, 10),
    net("torchvision/resnet18"),
    net("torchvision/resnet50"),
    net("timm/resnet26d"),
    net("torchvision/regnet_y_400mf"),
    net("timm/regnety_002"),
)
LOOPS = ("plain train", "tuned train", "plain infer", "tuned infer")


CASES = [
    pytest.param(net, loop, id=f"{net.name} {loop}", marks=pytest.mark.full if i > 1 or "infer" in loop else ())
    for i, net in enumerate(NETS)
    for loop in LOOPS
]


@pytest.mark.parametrize(("net", "loop"), CASES)
def bench_fuse(benchmark: Any, net: Net, loop: str) -> None:
    if net.name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed; pip install -e '.[timm]'")
    tuned, training = loop.startswith("tuned"), loop.endswith("train")

    def steps(model: torch.nn.Module) -> Steps:
        step = PlainLoop(model, plain_engine(tuned=tuned))
        for module in model.modules():
            if isinstance(module, FusedConv2d):
                module.algorithm = "cpp"  # as fuse left it, before the engine of the plain loop chose torch's
        return loop_training(step, None, net) if training else loop_inference(step, net)

    # Both have the same weights in the same memory: two copies of a network differ by up to 15 % in speed on a CPU.
    model = net.build()
    tensors: Any = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    ours, theirs = steps(fuse(copy.deepcopy(model, tensors))), steps(model)
    precision = "bf16" if tuned else "fp32"
    compare(benchmark, net, lambda: theirs, ours, training=training, precision=precision, loop=loop)
