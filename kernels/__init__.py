"""Fused BatchNorm + ReLU (+ residual add) for channels-last training. Imported as `fastres_kernels`.

This package knows nothing of fastres. Start reading at modules.py; ops.py picks between the Triton kernels (bn_*.py)
and the reference; cpu.py has what a CPU runs in place of torch's operations. `python -m fastres_kernels.report` prints
what the kernels cost.
"""

if __name__ != "fastres_kernels":
    # `kernels` is a widely used package of somebody else's; a checkout on sys.path would shadow it.
    raise ImportError(
        f"this package is imported as fastres_kernels, not {__name__}: pip install -e . in the checkout"
    )


from .modules import (
    BatchNormAct2d,
    Conv2d,
    NormConv2d,
    Skip,
    convert_sync_batchnorm,
    defer_running_stats,
    fuse_convolutions,
)

__all__ = [
    "BatchNormAct2d",
    "Conv2d",
    "NormConv2d",
    "Skip",
    "convert_sync_batchnorm",
    "defer_running_stats",
    "fuse_convolutions",
]
