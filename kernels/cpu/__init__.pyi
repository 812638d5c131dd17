from .ops import available, batch_norm_act, can_convolve, can_normalise, conv2d

__all__ = ["available", "batch_norm_act", "can_convolve", "can_normalise", "conv2d"]
