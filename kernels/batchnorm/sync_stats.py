"""Statistics shared by the processes of a group: what torch.nn.SyncBatchNorm does, on any device.

The collectives are torch's functional ones, so that torch.compile traces them. A group is named by its `group_name`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P sets of values as one: count (), mean (C,), M2 = Σ(v - mean)² (C,), from (P,), (P, C), (P, C). In one order
    (Chan, Golub & LeVeque 1979)."""
    weights = counts.to(means.dtype)[:, None]
    count = counts.sum()
    mean = (weights * means).sum(0) / count
    return count, mean, (m2s + weights * (means - mean) ** 2).sum(0)


def mean_and_var(count: Tensor, mean: Tensor, m2: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Count, (), mean and biased variance, each (C,), over all processes of the group, of count (), mean (C,) and M2
    (C,) of this one. Each process may have another count. Collective.
    """
    world_size = dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]
    mine = torch.cat([mean, m2, count.to(mean.dtype)[None]])
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(mine, world_size, group)
    everyone = torch.ops._c10d_functional.wait_tensor(gathered).view(world_size, -1)
    c = mean.numel()
    total, mean, m2 = merge(everyone[:, -1], everyone[:, :c], everyone[:, c : 2 * c])
    return total, mean, m2 / total


def mean_sums(sums: Tensor, count: int, group: str) -> Tensor:
    """(2, C) sums and the number of values behind them, of this process -> the sums of all divided by all values.
    Collective."""
    mine = torch.cat([sums.flatten(), sums.new_full((1,), count)])
    everyone = torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_reduce(mine, "sum", group)
    )
    return (everyone[:-1] / everyone[-1]).view_as(sums)
