"""Fused BatchNorm + ReLU (+ residual add) for channels-last training. Imported as `fastres_kernels`.

This package knows nothing of fastres. It holds the eager reference so far; the Triton kernels that will be
tested against it come next.
"""

if __name__ != "fastres_kernels":
    # `kernels` is a widely used package of somebody else's; a checkout on sys.path would shadow it.
    raise ImportError(
        f"this package is imported as fastres_kernels, not {__name__}: pip install -e . in the checkout"
    )

from .reference import batch_norm_act

__all__ = ["batch_norm_act"]
