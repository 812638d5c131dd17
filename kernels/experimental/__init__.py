"""Convolutions that normalise their input and measure their output; on no default path."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
