"""Count the bytes and launches of a basic residual block in the code that torch.compile generates. Needs no GPU.

    python -m fastres_kernels.analysis.inductor_counts    JSON: bytes, kernels and every launch, forward and backward

The block is conv 3×3 - BN - ReLU - conv 3×3 - BN - add - ReLU, stride 1, in training, channels-last, bf16 with float32
parameters: once with torch.nn.BatchNorm2d, which inductor may fuse, and once with BatchNormAct2d. Both are compiled for
an H100 up to the code that would be loaded there, and counted in bytes per element of one activation:

- A kernel that inductor generated counts each tl.load and tl.store of an activation or a mask in its source. Smaller
  tensors are ignored: vectors, and partial sums of at most 1/64 of an activation.
- A kernel of this package counts the bytes that its CompiledVariant declares.
- An op of this package that inductor does not look into counts, per launch, each activation and mask among its
  arguments and results once.
- A convolution counts two passes forward (read, write), and backward two for its input's gradient (read, write) and two
  for its weight's gradient (read both).

The cost of one block is half of the difference between four blocks and two, so that the costs at both ends cancel. The
difference is between two blocks, because inductor stores the sum of a skip connection's gradients only at every second
block, and recomputes this sum for each reader at the others.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget

from .. import modules
from ..batchnorm import ops
from ..modules import BatchNormAct2d, Skip
from ..tiling import H100
from .compiled_variants import RESNET20, CompiledVariant, declared_variants

SHAPE = RESNET20[0]
ELEMENTS = math.prod(SHAPE)
CUDNN = torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]
# Passes over activations, for each call in the generated code.
CONVOLUTIONS = {"extern_kernels.convolution": 2, "torch.ops.aten.convolution_backward.default": 4}
# Number of kernels of each op of this package that launches several.
KERNELS = {"torch.ops.fastres_kernels.conv_norm_backward.default": 2}


# ---- the blocks --------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """A 3×3 convolution that casts its weight as autocast does, because torch disables CUDA autocast without a GPU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        weight = torch.empty(channels, channels, 3, 3)
        self.weight = nn.Parameter(weight.to(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x, (N, C, H, W), in x's dtype."""
        return F.conv2d(x, self.weight.to(x.dtype), padding=1)


class TorchBlock(nn.Module):
    """The residual block with torch.nn.BatchNorm2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Convolution(channels), Convolution(channels)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x, (N, C, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return F.relu(y, inplace=True)


class FusedBlock(nn.Module):
    """The residual block with BatchNormAct2d; blocks pass each other the activation and its Skip."""

    def __init__(self, channels: int, algorithm: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = Convolution(channels), Convolution(channels)
        self.bn1, self.bn2 = (BatchNormAct2d(channels, algorithm=algorithm) for _ in range(2))

    def forward(self, x: Tensor | tuple[Tensor, Skip]) -> tuple[Tensor, Skip]:
        """Return the block's output and its Skip for x, (N, C, H, W), or for the previous block's result."""
        x, skip = x if isinstance(x, tuple) else (x, x)
        y = self.bn1(self.conv1(x))
        out: tuple[Tensor, Skip] = self.bn2(self.conv2(y), skip, fork=True)
        return out


# ---- generation --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def an_h100() -> Iterator[None]:
    """Make inductor find an H100 inside the block; it can only generate code, not run it."""
    h100 = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=H100,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    cuda = device_interface.CudaInterface
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (cuda, "is_available", lambda: True),
            (cuda, "get_device_properties", lambda device=None: h100),
            (cuda, "is_bf16_supported", lambda including_emulation=False: True),
            (cuda.Worker, "get_device_properties", lambda device=None: h100),
            (torch.cuda, "get_device_properties", lambda device=None: h100),
            (triton.runtime.driver, "_active", driver),
            # torch asks cuDNN for its backend only if there is a GPU; otherwise channels-last would be lost.
            (torch._C, "_select_conv_backend", lambda *args, **kwargs: CUDNN),
            # The traced tensors are on the CPU, for which the module and the op would choose torch and the reference.
            (modules, "runs_kernels", lambda x: True),
            (ops, "runs_kernels", lambda x: True),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


class Generated(Exception):
    """Raised instead of running the generated code."""


def an_activation() -> Tensor:
    """Return a (128, 16, 32, 32) bf16 channels-last tensor that requires its gradient."""
    return torch.empty(SHAPE, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()


def generate(work: Callable[..., Any], *inputs: Any) -> dict[str, tuple[GraphLowering, str]]:
    """Return the graphs of work(*inputs) that inductor lowers, and the code that it generates.

    Autograd rejects tensors that pretend to be on a GPU. Both passes are therefore traced on the CPU, differentiated
    and partitioned, and moved to the GPU before inductor sees them. One difference remains: the CPU's BatchNorm rounds
    the saved statistics, (C,) each, to bf16.

    Returns:
        "forward" -> (graph, code), and "backward" -> (graph, code) if a gradient is required.
    """
    generated: dict[str, tuple[GraphLowering, str]] = {}

    def move_and_lower(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        mode = detect_fake_mode(inputs)
        assert mode is not None
        with mode:
            inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in inputs]
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.update_kwarg("device", torch.device("cuda:0"))
        return compile_fx_inner(graph, inputs, **options)

    def keep(graph: GraphLowering) -> Any:
        """Keep the generated code; replaces GraphLowering.compile_to_module, which would load it."""
        wrapper, _ = graph.codegen()
        generated["backward" if graph.is_backward else "forward"] = (graph, wrapper.value)
        return SimpleNamespace(call=stop, __file__=None)

    def stop(inputs: list[Tensor]) -> Any:
        raise Generated

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return compile_fx(graph, inputs, inner_compile=move_and_lower)

    with (
        an_h100(),
        patch.object(GraphLowering, "compile_to_module", keep),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
        contextlib.suppress(Generated),
    ):
        torch.compile(work, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return generated


# ---- counting ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel of inductor's, of a kernel of this package, or of a convolution."""

    name: str
    bytes_per_element: float  # of one activation


def launches(graph: GraphLowering, code: str, variants: list[CompiledVariant]) -> list[Launch]:
    """Return all launches in the generated code, in order.

    Raises:
        KeyError: for an operation that is neither of this package nor a convolution.
    """
    nodes = list(ast.walk(ast.parse(code)))
    results: dict[ast.expr, str] = {}  # RESULT = value
    sources: dict[str, str] = {}  # NAME = async_compile.triton("name", """source""", ...)
    parts: dict[str, list[ast.expr]] = defaultdict(list)  # PART = RESULT[i]
    for node in nodes:
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            results[node.value] = ast.unparse(target)
            if isinstance(node.value, ast.Subscript):
                parts[ast.unparse(node.value.value)].append(target)
            elif isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "async_compile.triton":
                sources[ast.unparse(target)] = ast.literal_eval(node.value.args[1])

    found = []
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        name = ast.unparse(call.func)
        if name.startswith("torch.ops.fastres_kernels."):
            taken = [argument for argument in call.args if not isinstance(argument, ast.Constant)]
            tensors = {ast.unparse(tensor): tensor for tensor in (*taken, *parts[results[call]])}
            moved = sum(tensor_bytes(graph, tensor) for tensor in tensors.values())
            kernels = KERNELS.get(name, 1)
            found += [Launch(name, moved / ELEMENTS / kernels)] * kernels
        elif name.startswith(("extern_kernels.", "torch.ops.", "aten.")):
            found.append(Launch(name, CONVOLUTIONS[name] * torch.bfloat16.itemsize))
        elif name.endswith(".run"):
            name = name.removesuffix(".run")
            found.append(Launch(name, bytes_per_element(sources[name], call, graph, variants)))
    return found


def bytes_per_element(source: str, call: ast.Call, graph: GraphLowering, variants: list[CompiledVariant]) -> float:
    """Return the bytes per element that `call` moves, which launches the first function in `source`."""
    kernel = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    if not kernel.name.startswith("triton_"):  # inductor's prefix for the kernels that it generates
        return variant_of(kernel, variants).bytes_per_element or 0
    accesses = Counter(
        name.id
        for node in ast.walk(kernel)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store")
        for name in ast.walk(node.args[0])
        if isinstance(name, ast.Name)
    )
    # The call does not pass constexprs, which are the last parameters.
    arguments = zip(kernel.args.args, call.args, strict=False)
    moved = sum(
        accesses[parameter.arg] * tensor_bytes(graph, argument)
        for parameter, argument in arguments
        if parameter.arg in accesses
    )
    return moved / ELEMENTS


def tensor_bytes(graph: GraphLowering, tensor: ast.expr) -> int:
    """Return the bytes of an activation or a mask, which has at least one bit per element; 0 for smaller tensors."""
    # The expression is reinterpret_tensor(name, ...) or the name itself.
    name = ast.unparse(tensor.args[0] if isinstance(tensor, ast.Call) else tensor)
    numel = int(graph.get_numel(name))
    return numel * graph.get_dtype(name).itemsize if numel >= ELEMENTS // 8 else 0


def variant_of(kernel: ast.FunctionDef, variants: list[CompiledVariant]) -> CompiledVariant:
    """Return the CompiledVariant of a kernel of this package in generated code. Raise LookupError if there is none."""
    (heuristics,) = (node for node in kernel.decorator_list if isinstance(node, ast.Call))
    (meta,) = (keyword.value for keyword in heuristics.keywords if keyword.arg == "triton_meta")
    assert isinstance(meta, ast.Dict)
    entries = {ast.unparse(key): value for key, value in zip(meta.keys, meta.values, strict=True) if key}
    types, constants = (ast.literal_eval(entries[repr(name)]) for name in ("signature", "constants"))
    for variant in variants:
        if (variant.kernel.__name__, variant.types, variant.constants) == (kernel.name, types, constants):
            return variant
    raise LookupError(f"torch.compile launches {kernel.name} in an undeclared variant: {types}, {constants}")


def per_block(block: Callable[[int], nn.Module]) -> dict[str, dict[str, Any]]:
    """Return for "forward" and "backward" the totals of one block, and every launch of a stack of four blocks."""
    variants = declared_variants()

    def stack(blocks: int) -> dict[str, list[Launch]]:
        generated = generate(nn.Sequential(*(block(SHAPE[1]) for _ in range(blocks))), an_activation())
        return {name: launches(graph, code, variants) for name, (graph, code) in generated.items()}

    two, four = stack(2), stack(4)
    result = {}
    for name, all_launches in four.items():
        before, after = totals(two[name]), totals(all_launches)
        result[name] = {
            **{key: (after[key] - before[key]) / 2 for key in after},
            "launches_of_four_blocks": [asdict(launch) for launch in all_launches],
        }
    return result


def totals(found: list[Launch]) -> dict[str, float]:
    """Return the number of kernels and of convolutions, and the bytes per element of each."""
    convolutions = [launch.bytes_per_element for launch in found if launch.name in CONVOLUTIONS]
    kernels = [launch.bytes_per_element for launch in found if launch.name not in CONVOLUTIONS]
    return {
        "kernels": len(kernels),
        "kernel_bytes_per_element": sum(kernels),
        "convolutions": len(convolutions),
        "convolution_bytes_per_element": sum(convolutions),
    }


if __name__ == "__main__":
    blocks: dict[str, Callable[[int], nn.Module]] = {"torch": TorchBlock}
    blocks |= {name: partial(FusedBlock, algorithm=name) for name in ("two_pass", "cooperative")}
    print(json.dumps({name: per_block(block) for name, block in blocks.items()}))
