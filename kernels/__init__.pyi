from .modules import BatchNormAct2d, Conv2d, DeferredRunningStats, Skip, convert_sync_batchnorm, defer_running_stats

__all__ = ["BatchNormAct2d", "Conv2d", "DeferredRunningStats", "Skip", "convert_sync_batchnorm", "defer_running_stats"]
