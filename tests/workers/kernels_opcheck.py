"""Run opcheck on conv_norm and its backward without the interpreter, so that the ops run the reference."""

from __future__ import annotations

import torch

from fastres_kernels import triton_launch
from fastres_kernels.experimental import ops


def main() -> None:
    assert triton_launch.HAS_TRITON and not triton_launch.INTERPRETED
    x, weight = torch.randn(2, 16, 3, 4), torch.randn(16, 16, 3, 3)
    vectors = [torch.rand(16) for _ in range(4)]
    z, mean, var = ops.conv_norm(x, weight, *vectors, 1e-5)
    backward = (z, mean, var, x, weight, *vectors, 1e-5, z, mean, True, True)
    torch.library.opcheck(torch.ops.fastres_kernels.conv_norm_backward, backward)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, *vectors)]
    torch.library.opcheck(torch.ops.fastres_kernels.conv_norm, (*leaves, 1e-5))
    print("checked")


if __name__ == "__main__":
    main()
