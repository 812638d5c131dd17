"""Tools that count the cost of the kernels and of inductor's code; no product code imports them."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
