"""Fused BatchNorm + ReLU (+ residual add) for channels-last training, imported as `fastres_kernels`.

The package imports nothing of fastres. Start reading at modules.py: it chooses a backend for each call. batchnorm/ has
the Triton kernels, cpu/ the C++ kernels, reference.py the oracle in plain PyTorch. `python -m fastres_kernels.report`
prints the cost of the kernels. The public names are listed in __init__.pyi and imported on first use.
"""

if __name__ != "fastres_kernels":
    # `kernels` is a widely used package on PyPI; a checkout on sys.path would shadow it.
    raise ImportError(f"this package is imported as fastres_kernels, not {__name__}: pip install -e . in the checkout")

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
