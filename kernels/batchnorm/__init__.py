"""BatchNorm + ReLU (+ residual add) as operators of torch: Triton kernels, with the reference as fallback."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
