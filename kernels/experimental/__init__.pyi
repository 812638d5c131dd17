from .modules import DeferredNormAct, NormConv2d, PrecomputedStatsNormAct2d, WithStatistics, fuse_convolutions

__all__ = ["DeferredNormAct", "NormConv2d", "PrecomputedStatsNormAct2d", "WithStatistics", "fuse_convolutions"]
