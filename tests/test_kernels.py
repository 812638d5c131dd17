"""The kernels' package: its name, and the oracle that kernels will be held to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres.models.blocks import norm_act
from fastres_kernels import batch_norm_act


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_oracle_is_the_seam_in_float64_forward_and_backward(training: bool, with_residual: bool) -> None:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(5).double().train(training) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
    inputs = [torch.randn(3, 5, 7, 2).double().requires_grad_() for _ in range(2)]
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    ours = batch_norm_act(norms[0], inputs[0], inputs[1] if with_residual else None)
    theirs = norm_act(norms[1], twins[0], twins[1] if with_residual else None)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert torch.equal(ours, theirs) and (ours == 0).any()
    assert torch.equal(inputs[0].grad, twins[0].grad)
    assert torch.equal(norms[0].weight.grad, norms[1].weight.grad)
    assert torch.equal(norms[0].running_var, norms[1].running_var)


def test_the_wrong_import_name_is_loud() -> None:
    checkout = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "is imported as fastres_kernels, not kernels" in done.stderr
