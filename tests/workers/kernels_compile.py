"""Train ResNet-20 with fused norms compiled and eager, and count the ops in the graphs that inductor receives.

It prints the number of batch_norm_act in the forward graph and of batch_norm_act_backward in the backward graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
from torch._inductor import compile_fx

from tests.workers.kernels_train import assert_equal_losses, losses


def main() -> None:
    seen: list[list[str]] = []
    inner = compile_fx.compile_fx_inner

    def watched(graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return inner(graph, *args, **kwargs)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=watched)

    torch._functorch.config.enable_autograd_cache = False
    plain, fused, compiled = (list(losses("torch")), list(losses("fused")), list(losses("fused", backend)))
    assert_equal_losses(plain, fused)
    assert_equal_losses(plain, compiled)
    forward, backward = seen
    print(sum("fastres_kernels.batch_norm_act.default" in target for target in forward))
    print(sum("fastres_kernels.batch_norm_act_backward.default" in target for target in backward))


if __name__ == "__main__":
    main()
