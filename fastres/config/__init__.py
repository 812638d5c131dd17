"""Run configuration: its fields, their validation, and the command line and files that set them."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
