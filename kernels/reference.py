"""Reference implementation of the kernels in plain PyTorch: the oracle of the tests and benches.

The ops also run it for tensors that have no Triton kernel: on a CPU, and in float64. Arithmetic is in at least float32,
and each result is rounded once to its tensor's dtype.
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
    mean: Tensor | None,  # (C,), with var: given statistics; None: use the statistics of x
    var: Tensor | None,  # (C,), biased
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x, add the residual and activate (Ioffe & Szegedy 2015, algorithm 1; He et al. 2015, figure 2).

    Returns:
        y: act(weight·(x - mean)/√(var + eps) + bias + residual), of x's shape and dtype.
        mean, var: the mean and biased variance used, (C,) each.
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
    """Return Σ dz and Σ dz·x̂ over N, H, W, (C,) each: the gradients of bias and weight.

    dz, (N, C, H, W), is the gradient of y masked by the activation; it is also the residual's gradient. x̂ is the
    normalised x.
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
    means: Tensor | None,  # (2, C): channel_sums divided by the number of values per channel
) -> Tensor:
    """Return dx = weight/√(var + eps)·(dz - mean(dz) - x̂·mean(dz·x̂)) in x's dtype (Ioffe & Szegedy 2015, section 3).

    `means` is None if the statistics were given: they do not depend on x, so the last two terms vanish.
    """
    wide = wide_dtype(x)
    invstd = torch.rsqrt(var + eps)
    dx = dz.to(wide)
    if means is not None:
        normalised = (x.to(wide) - over_channels(mean)) * over_channels(invstd)
        dx = dx - over_channels(means[0]) - normalised * over_channels(means[1])
    return (dx * over_channels(invstd if weight is None else invstd * weight)).to(x.dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for arithmetic on x and for its statistics: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def over_channels(per_channel: Tensor) -> Tensor:
    """Reshape (C,) to (C, 1, 1), which broadcasts over (N, C, H, W)."""
    return per_channel[:, None, None]


def conv_norm(
    x: Tensor,  # (N, C, H, W), any strides
    weight: Tensor,  # (K, C, r, r), r = 1 or 3
    mean: Tensor | None,  # (C,), with var: statistics to normalise x with; None: convolve x itself, without ReLU
    var: Tensor | None,  # (C,), biased
    gamma: Tensor | None,  # (C,)
    beta: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z = conv(relu(gamma·(x - mean)/√(var + eps) + beta), weight) and the statistics of z.

    The convolution has stride 1 and "same" zero padding. The activation is rounded to x's dtype before the convolution,
    and z before its statistics are computed, as separate layers would do. All inputs are differentiable, including mean
    and var, so a chain of these calls has the gradients of BatchNorm with batch statistics.

    Returns:
        z: (N, K, H, W), of x's dtype.
        mean, var: the mean and biased variance of z over N, H, W, (K,) each.
    """
    wide = wide_dtype(x)
    a = x.to(wide)
    if mean is not None and var is not None:
        scale = torch.rsqrt(var + eps) * (1 if gamma is None else gamma)
        # Subtract the mean first, because a * scale - mean * scale cancels if the mean is large.
        a = (a - over_channels(mean)) * over_channels(scale)
        a = F.relu(a if beta is None else a + over_channels(beta))
    a = a.to(x.dtype).to(wide)
    with torch.autocast(x.device.type, enabled=False):  # autocast would run the convolution in bf16 or fp16
        z = F.conv2d(a, weight.to(x.dtype).to(wide), padding=weight.shape[-1] // 2).to(x.dtype)
    var_z, mean_z = torch.var_mean(z.to(wide), (0, 2, 3), correction=0)
    return z, mean_z, var_z
