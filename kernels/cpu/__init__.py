"""BatchNorm + ReLU (+ residual add) and 3×3 convolutions in bf16 for CPUs with AVX-512, in C++."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
