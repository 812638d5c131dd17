from .ops import available, batch_norm_act, conv2d, convolves, normalises

__all__ = ["available", "batch_norm_act", "conv2d", "convolves", "normalises"]
