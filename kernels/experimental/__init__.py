"""Convolutions fused with the normalisation of their input and the statistics of their output; off by default."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
