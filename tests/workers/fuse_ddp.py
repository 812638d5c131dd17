"""Train a fused network on two ranks under DistributedDataParallel, with and without shared statistics.

The ranks' gradients have to be those of the network that is not fused.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres_kernels import BatchNormAct2d, convert_sync_batchnorm


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        parallel.zero_grad()
        parallel(images).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    for shares in (False, True):
        networks = [copy.deepcopy(model), fastres.fuse(copy.deepcopy(model))]
        if shares:
            networks = [convert_sync_batchnorm(network) for network in networks]
            assert all(m.group_name for n in networks for m in n.modules() if isinstance(m, BatchNormAct2d))
        plain, fused = (gradients(network, images) for network in networks)
        torch.testing.assert_close(fused, plain, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(list(networks[1].buffers()), list(networks[0].buffers()), rtol=1e-8, atol=1e-8)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
