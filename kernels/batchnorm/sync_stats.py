"""Share BatchNorm statistics between the ranks of a process group, as torch.nn.SyncBatchNorm does, on any device.

The collectives are torch's functional ones, so that torch.compile traces them. A group is named by its `group_name`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of P sets of values in a fixed order (Chan, Golub & LeVeque 1979).

    Args:
        counts: (P,).
        means: (P, C).
        m2s: (P, C), sums of squared differences from each set's mean.

    Returns:
        The count (), mean (C,) and M2 (C,) of all sets together.
    """
    weights = counts.to(means.dtype)[:, None]
    count = counts.sum()
    mean = (weights * means).sum(0) / count
    return count, mean, (m2s + weights * (means - mean) ** 2).sum(0)


def mean_and_var(count: Tensor, mean: Tensor, m2: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the count (), mean (C,) and biased variance (C,) over all ranks of the group. Collective.

    Args:
        count: () number of values per channel on this rank; ranks may differ.
        mean: (C,) of this rank.
        m2: (C,) of this rank.
        group: the group's name.
    """
    world_size = dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type, attr-defined]
    mine = torch.cat([mean, m2, count.to(mean.dtype)[None]])
    everyone = gather(mine, world_size, group)
    c = mean.numel()
    total, mean, m2 = merge(everyone[:, -1], everyone[:, :c], everyone[:, c : 2 * c])
    return total, mean, m2 / total


def gather(mine: Tensor, world_size: int, group: str) -> Tensor:
    """Return every rank's vector, (world_size, n), from this rank's, (n,). Collective.

    On a CPU this is an all-to-all that sends the same vector to every rank, because gloo's all-gather of functional
    collectives corrupts the heap: the two worker threads of a process group both assign the name of the operation they
    finished to one std::string without a lock (ProcessGroupGloo::runLoop, torch 2.14). "ALLGATHER_COALESCED" is longer
    than the 15 characters that fit into the string itself, so two assignments at once free its memory twice; the
    process then dies with "malloc(): unaligned tcache chunk detected". The all-to-all has a shorter name.
    """
    if mine.device.type == "cpu":
        n = [mine.numel()] * world_size
        gathered = torch.ops._c10d_functional.all_to_all_single(mine.repeat(world_size), n, n, group)
    else:
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(mine, world_size, group)
    vectors: Tensor = torch.ops._c10d_functional.wait_tensor(gathered)
    return vectors.view(world_size, -1)


def mean_sums(sums: Tensor, count: int, group: str) -> Tensor:
    """Return the (2, C) sums over all ranks, divided by the number of values on all ranks. Collective.

    Args:
        sums: (2, C) of this rank.
        count: the number of values that they sum.
        group: the group's name.
    """
    mine = torch.cat([sums.flatten(), sums.new_full((1,), count)])
    everyone: Tensor = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(mine, "sum", group))
    return (everyone[:-1] / everyone[-1]).view_as(sums)
