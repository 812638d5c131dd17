from . import batchnorm, convolution

__all__ = ["batchnorm", "convolution"]
