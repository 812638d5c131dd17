"""Test networks whose convolutions normalise their own input, which are experimental and off by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models.registry import build_model
from fastres_kernels.experimental import NormConv2d
from fastres_kernels.experimental.ops import kernels_for


def train(model: nn.Module, dtype: torch.dtype, steps: int, batch: int, side: int, **compile: Any) -> list[float]:
    """Return the losses of `steps` steps of SGD, and the loss in inference mode afterwards."""
    generator = torch.Generator().manual_seed(1)
    model = model.to(dtype).to(memory_format=torch.channels_last)
    forward = torch.compile(model, fullgraph=True, dynamic=False, **compile) if compile else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x = torch.randn(batch, 3, side, side, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), generator=generator)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [*losses, F.cross_entropy(model.eval()(x), y).item()]


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return a plain network and a network with fused convolutions and the same weights."""
    plain = build_model(name, **options)
    fused = build_model(name, norm="fused", fused_convolutions=True, **options)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize(
    ("name", "options", "fused_layers"),
    [
        ("resnet20", {}, 16),  # all convolutions but the stem and the two with a stride
        ("plain8", {}, 4),
        ("resnet8", {"shortcut": "conv1x1"}, 4),
        # 1×1 convolutions without a stride, and layer1's 3×3 of 64 channels
        pytest.param("resnet50", {"stem": "small"}, 33 + 3, marks=pytest.mark.slow),
    ],
)
def test_fused_networks_equal_the_plain_networks_in_float64(
    name: str, options: dict[str, Any], fused_layers: int
) -> None:
    plain, fused = pair(name, **options)
    assert sum(isinstance(module, NormConv2d) for module in fused.modules()) == fused_layers
    assert list(fused.state_dict()) == list(plain.state_dict())
    expected = train(plain, torch.float64, 3, batch=4, side=16)
    assert train(fused, torch.float64, 3, batch=4, side=16) == pytest.approx(expected, rel=1e-9)
    for (key, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-7, atol=1e-10), key


@pytest.mark.slow
def test_resnet20_trains_in_the_interpreter_to_the_losses_of_the_plain_network() -> None:
    plain, fused = pair("resnet20")
    x = torch.empty(2, 16, 8, 8)
    assert all(kernels_for(x, m.weight) for m in fused.modules() if isinstance(m, NormConv2d))
    expected = train(plain, torch.float32, 2, batch=2, side=8)
    assert train(fused, torch.float32, 2, batch=2, side=8) == pytest.approx(expected, rel=1e-4)


def test_fused_networks_compile_in_one_graph() -> None:
    plain, fused = pair("resnet8")
    expected = train(plain, torch.float64, 2, batch=4, side=8)
    assert train(fused, torch.float64, 2, batch=4, side=8, backend="aot_eager") == pytest.approx(expected)


def test_under_autocast_activations_are_narrow_and_statistics_are_not() -> None:
    _, fused = pair("resnet8")
    seen: list[Tensor] = []
    for module in fused.modules():
        if isinstance(module, NormConv2d):
            module.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    with torch.autocast("cpu", torch.bfloat16):
        fused(torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
    assert [t.dtype for t in seen] == [torch.bfloat16, torch.float32, torch.float32] * 4


def test_fused_convolutions_need_the_fused_norm() -> None:
    with pytest.raises(ValueError, match="fused_convolutions: need norm 'fused'"):
        build_model("resnet20", fused_convolutions=True)
