"""The oracle: what the kernels compute, in plain PyTorch, from float64 down; tests and benches both use it.

It is also what the ops run where there is no kernel for a tensor: on a CPU, and in float64.
Arithmetic is in at least float32, results are rounded once to their tensor's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm_act(
    x: Tensor,  # (N, C, H, W), any strides
    residual: Tensor | None,  # (N, C, H, W)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor | None,  # (C,), with var: statistics to normalise with; None: those of x
    var: Tensor | None,  # (C,), biased
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act(weight * (x - mean) / sqrt(var + eps) + bias + residual), with x's dtype, and the mean and biased
    variance used, each (C,) (Ioffe & Szegedy 2015, algorithm 1; the order of He et al. 2015, figure 2).
    """
    wide = x.to(wide_dtype(x))
    if mean is None or var is None:
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    y = (wide - over_channels(mean)) * over_channels(torch.rsqrt(var + eps))
    if weight is not None:
        y = y * over_channels(weight)
    if bias is not None:
        y = y + over_channels(bias)
    if residual is not None:
        y = y + residual
    y = y.to(x.dtype)
    return F.relu(y) if relu else y, mean, var


def channel_sums(dz: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Σ dz and Σ dz·x̂ over N, H, W, each (C,): the gradients of bias and weight. dz, (N, C, H, W), is the gradient
    of y where the activation let through, else 0, and so the gradient of the residual; x̂ is x normalised.
    """
    wide = wide_dtype(x)
    normalised = (x.to(wide) - over_channels(mean)) * over_channels(torch.rsqrt(var + eps))
    return dz.to(wide).sum((0, 2, 3)), (dz * normalised).sum((0, 2, 3))


def input_gradient(
    dz: Tensor,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W)
    weight: Tensor | None,  # (C,)
    mean: Tensor,  # (C,)
    var: Tensor,  # (C,)
    eps: float,
    means: Tensor | None,  # (2, C): channel_sums divided by the number of values that the statistics are of
) -> Tensor:
    """dx = weight / sqrt(var + eps) * (dz - mean(dz) - x̂·mean(dz·x̂)), with x's dtype (Ioffe & Szegedy 2015,
    section 3).

    `means` None: the statistics were given, x has no part in them, and the last two terms vanish.
    """
    wide = wide_dtype(x)
    invstd = torch.rsqrt(var + eps)
    dx = dz.to(wide)
    if means is not None:
        normalised = (x.to(wide) - over_channels(mean)) * over_channels(invstd)
        dx = dx - over_channels(means[0]) - normalised * over_channels(means[1])
    return (dx * over_channels(invstd if weight is None else invstd * weight)).to(x.dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of arithmetic on x and of its statistics: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def over_channels(per_channel: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1), which broadcasts over (N, C, H, W)."""
    return per_channel[:, None, None]


def conv_norm(
    x: Tensor,  # (N, C, H, W), any strides
    weight: Tensor,  # (K, C, r, r), r = 1 or 3
    mean: Tensor | None,  # (C,), with var: of x's normalisation; None: x is taken as it is
    var: Tensor | None,  # (C,), biased
    gamma: Tensor | None,  # (C,)
    beta: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = conv(relu(gamma * (x - mean) / sqrt(var + eps) + beta), weight), stride 1, "same" zero padding, and the
    mean and biased variance of z over N, H, W, each (K,).

    The activation is rounded to x's dtype before the convolution, and z before its statistics are taken: as separate
    layers would. Differentiable in everything, mean and var included, so that chains of it differentiate as
    BatchNorm with batch statistics does.
    """
    wide = wide_dtype(x)
    a = x.to(wide)
    if mean is not None and var is not None:
        scale = torch.rsqrt(var + eps) * (1 if gamma is None else gamma)
        # The mean first: a * scale - mean * scale would cancel where the mean is large.
        a = (a - over_channels(mean)) * over_channels(scale)
        a = F.relu(a if beta is None else a + over_channels(beta))
    a = a.to(x.dtype).to(wide)
    with torch.autocast(x.device.type, enabled=False):  # it would narrow the convolution
        z = F.conv2d(a, weight.to(x.dtype).to(wide), padding=weight.shape[-1] // 2).to(x.dtype)
    var_z, mean_z = torch.var_mean(z.to(wide), (0, 2, 3), correction=0)
    return z, mean_z, var_z
