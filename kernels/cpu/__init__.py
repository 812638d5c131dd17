"""C++ kernels for CPUs: BatchNorm + ReLU (+ residual add) in bf16 and float32, and 3×3 convolutions in bf16."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
