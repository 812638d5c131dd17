from . import ops
from .dispatch_table import fastest
from .ops import batch_norm_act, batch_norm_act_backward, update_running_statistics

__all__ = ["batch_norm_act", "batch_norm_act_backward", "fastest", "ops", "update_running_statistics"]
