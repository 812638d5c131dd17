"""Fold every BatchNorm2d that follows a convolution into the convolution, in a copy of a network for inference.

With fixed statistics BatchNorm is an affine map of each channel, so the convolution can compute it by other weights
and a bias (Jacob et al. 2018, section 3.2). On a CPU oneDNN, or fastres_kernels by Winograd's algorithm, then applies
the bias, an addition and ReLU while the convolution's output is still in registers, so that each layer makes one pass
over its output instead of three or four.

torch.fx records the forward of the whole network in eval mode as one graph, under the rules of fusion/tracing.py. In
the graph, convolution -> BatchNorm2d (-> add) (-> ReLU) becomes one call of FoldedConv2d.
"""

from __future__ import annotations

import copy
import operator
import platform
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastres.models.fuse import unfuse
from fastres.models.fusion.modules import has_hooks
from fastres.models.fusion.patterns import ADDS, RELUS, is_timm_norm
from fastres.models.fusion.tracing import ForbidTensors, Tracer, in_mode, random_state, recorded_reads
from fastres_kernels import BatchNormAct2d, Conv2d
from fastres_kernels.cpu import convolution
from fastres_kernels.cpu.library import dense

CONVOLUTIONS = (nn.Conv2d, Conv2d)  # these classes themselves; a subclass may compute something else

OPS = torch.ops.mkldnn
ADD_AND_RELU: tuple[Any, ...] = ("add", 1.0, "relu", [], "")  # the last arguments of the operators that add


def folded(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of the network for inference, with each BatchNorm2d folded into the convolution before it.

    The copy computes the same function as the network in eval mode, in other roundings. It has the weights of this
    moment, shares no tensor with the network, and takes and returns what the network's forward does without optional
    arguments. It has gradients with respect to the images, none with respect to the folded weights, and cannot be
    pickled.

    A BatchNorm2d is folded if a torch.nn.Conv2d or fastres_kernels.Conv2d computes its input, nothing else reads the
    convolution's output, it has running statistics, and neither has hooks. All other modules are copied as they are.

    Args:
        model: any network, fused by fastres.fuse or not; it stays unchanged.
        dtype: of the folded convolutions, which cast their input; None for the dtype of their weights. Under autocast
            give autocast's dtype, so that the weights are cast once and not in every call.

    Returns:
        The copy, or `model` itself if no BatchNorm2d can be folded or the forward cannot be recorded.
    """
    try:
        return _folded(model, dtype)
    except Exception:  # foreign code may raise anything when it is copied or recorded
        return model


def _folded(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return folded()'s result. Raise an error if the forward cannot be recorded."""
    twin = _without_forks(model)
    graph = _recorded(twin)
    new = _Folding(twin, graph, dtype).run()
    if not new:
        return model
    memo: dict[int, Any] = {}  # one, so that modules that share a tensor still do
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in new:
            new[str(node.target)] = copy.deepcopy(operator.attrgetter(str(node.target))(twin), memo)
    return fx.GraphModule(new, graph, type(model).__name__).eval()


class FoldedConv2d(nn.Module):
    """relu(conv2d(x) + residual) with a bias, and without the parts that are not there.

    The weights are buffers, because nothing trains them.

    Args:
        conv: the convolution whose geometry it has.
        weight: (K, C/groups, h, w), the convolution's weight times BatchNorm's scale of each output channel.
        bias: (K,).
        relu: apply ReLU.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.relu = relu
        self.geometry: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.padding = _padding(conv)
        allowed = getattr(conv, "algorithm", "cpp") == "cpp"  # nn.Conv2d has no such choice
        self.winograd = allowed and conv.stride == (1, 1) and convolution.has_kernel(conv)
        # The weight in oneDNN's own layout for this shape of x. A layout for another shape would be reordered in every
        # call, which takes up to 50 times as long as a 1×1 convolution of one image.
        self.packed: tuple[torch.Size, Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """Return the result, (N, K, H', W') of the weight's dtype, or wider if the residual's is.

        Args:
            x: (N, C, H, W), cast to the weight's dtype.
            residual: what is added before ReLU, usually of the result's shape.
            overwrite: the result may be written to the residual, because nothing reads it afterwards.
        """
        x = x.to(self.weight.dtype)
        if self._onednn_takes(x, residual):
            if self.winograd and convolution.can_convolve_folded(x, self.weight):
                return self._winograd(x, residual, overwrite)
            return self._onednn(x, residual, overwrite)
        y = F.conv2d(x, self.weight, self.bias, *self.geometry)
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.relu else y

    def _onednn_takes(self, x: Tensor, residual: Tensor | None) -> bool:
        """Return True if oneDNN's convolution with an epilogue can compute the result."""
        return (
            self.padding is not None
            and x.device.type == "cpu"
            and x.ndim == 4
            and x.numel() > 0
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (x.requires_grad or getattr(residual, "requires_grad", False)))
            and bool(torch.backends.mkldnn.enabled)
            and _has_onednn(x.dtype)
            and (residual is None or self._shaped_as_result(x, residual))
        )

    def _shaped_as_result(self, x: Tensor, residual: Tensor) -> bool:
        """Return True if the residual has the dtype, shape and memory order of the convolution of x."""
        assert self.padding is not None
        stride, _, dilation, _ = self.geometry
        sides = (
            (x.shape[i + 2] + 2 * self.padding[i] - dilation[i] * (self.weight.shape[i + 2] - 1) - 1) // stride[i] + 1
            for i in range(2)
        )
        dense = residual.is_contiguous(memory_format=torch.channels_last)
        return dense and residual.dtype == x.dtype and residual.shape == (len(x), len(self.weight), *sides)

    def _onednn(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        """Return the result by the operators of oneDNN that inductor's freezing uses too."""
        stride, _, dilation, groups = self.geometry
        packed = self.packed
        if packed is None or packed[0] != x.shape:
            weight = OPS._reorder_convolution_weight(self.weight, self.padding, stride, dilation, groups, list(x.shape))
            self.packed = packed = (x.shape, weight)
        arguments = (x, packed[1], self.bias, self.padding, stride, dilation, groups)
        if residual is None:
            y: Tensor = OPS._convolution_pointwise(*arguments, "relu" if self.relu else "none", [], "")
            return y
        epilogue = ADD_AND_RELU if self.relu else (*ADD_AND_RELU[:2], None, [], "")
        if overwrite:
            y = OPS._convolution_pointwise_.binary(residual, *arguments, *epilogue)
        else:
            y = OPS._convolution_pointwise.binary(x, residual, *arguments[1:], *epilogue)
        return y

    def _winograd(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        """Return the result by Winograd's algorithm in C++."""
        y = residual if overwrite else None
        if y is None:
            y = torch.empty((len(x), len(self.weight), *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last)
        weight, bias = dense(self.weight, torch.float32), self.bias.float()
        convolution.OPS.cpp_winograd_act(x, weight, bias, residual, self.relu, y)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv2d:
        self.packed = None  # because the weight changes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": None}  # oneDNN's layout cannot be copied or pickled

    def extra_repr(self) -> str:
        """Return the shape of the weight and the geometry."""
        stride, padding, dilation, groups = self.geometry
        shape = tuple(self.weight.shape)
        return f"{shape}, {stride=}, {padding=}, {dilation=}, {groups=}, relu={self.relu}"


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Return True if oneDNN's convolutions with an epilogue work in this dtype, as a small one shows.

    Its operators are internal to torch, so another version may lack them or give them other arguments.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False  # other processors were not measured
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    x = torch.arange(256.0).sin().view(1, 16, 4, 4).to(dtype, memory_format=torch.channels_last)
    w = torch.arange(2304.0).cos().view(16, 16, 3, 3).to(dtype, memory_format=torch.channels_last)
    one, b = (1, 1), x[0, :, 0, 0].contiguous()
    try:
        if dtype == torch.bfloat16 and not OPS._is_mkldnn_bf16_supported():
            return False
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = F.relu(F.conv2d(x, w, b, 1, 1))
            packed = OPS._reorder_convolution_weight(w, one, one, one, 1, list(x.shape))
            y = OPS._convolution_pointwise(x, packed, b, one, one, one, 1, "relu", [], "")
            sums = [x.clone(), OPS._convolution_pointwise.binary(x, x, packed, b, one, one, one, 1, *ADD_AND_RELU)]
            OPS._convolution_pointwise_.binary(sums[0], x, packed, b, one, one, one, 1, *ADD_AND_RELU)
            right = F.relu(F.conv2d(x, w, b, 1, 1) + x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    pairs = ((y, expected), (sums[0], right), (sums[1], right))
    return all(torch.allclose(found.float(), wanted.float(), rtol=0.02, atol=0.05) for found, wanted in pairs)


def _padding(conv: nn.Conv2d) -> tuple[int, ...] | None:
    """Return the rows and columns of padding on each side, or None if the sides differ."""
    if isinstance(conv.padding, tuple):
        return conv.padding
    if conv.padding == "valid":
        return (0, 0)
    both = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(rows % 2 for rows in both) else tuple(rows // 2 for rows in both)


# ---- the graph ---------------------------------------------------------------------------------------------


def _without_forks(model: nn.Module) -> nn.Module:
    """Return the network with the same tensors in other modules, which are not fused and return no pairs.

    Raises:
        ValueError: if a copy of the network would not have all of its behaviour.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = unfuse(copy.deepcopy(model, tensors))
    if has_hooks(twin) or any("forward" in module.__dict__ for module in twin.modules()):
        raise ValueError("the network has hooks, or a forward was replaced")
    for module in twin.modules():
        if isinstance(module, BatchNormAct2d):
            module.forks = False
    return twin.eval()


def _recorded(model: nn.Module) -> fx.Graph:
    """Return the graph of the network's forward in eval mode. Raise an error if no graph can stand for it."""
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorded_reads({}))
        stack.enter_context(ForbidTensors())  # type: ignore[no-untyped-call]
        before = random_state()
        graph: fx.Graph = _FlatTracer(type(model).forward, (), "tensor", []).trace(model)
        if random_state() != before:
            raise ValueError("the forward draws random numbers outside of torch's operations")
    return graph


class _FlatTracer(Tracer):
    """A tracer that records the forwards of all modules in one graph, down to those of torch.nn, norms and hooks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True if the graph calls the module instead of having its operations."""
        known = type(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return known or type(m) in CONVOLUTIONS or isinstance(m, nn.BatchNorm2d) or has_hooks(m)


class _Folding:
    """Rewrites the graph of a network: convolution -> BatchNorm2d (-> add) (-> ReLU) becomes FoldedConv2d.

    Args:
        model: the network that the graph was recorded from.
        graph: changed in place.
        dtype: of the folded convolutions; None for their weights'.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, dtype: torch.dtype | None) -> None:
        self.model, self.graph, self.dtype = model, graph, dtype
        self.new: dict[str, nn.Module] = {}  # by the name in the graph
        self.nodes: set[fx.Node] = set()  # the calls of these modules

    def run(self) -> dict[str, nn.Module]:
        """Fold what can be folded, and return the new modules by their names in the graph."""
        for node in list(self.graph.nodes):
            identity = self._called(node)
            if type(identity) is nn.Identity and not has_hooks(identity) and len(node.args) == 1:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        for node in list(self.graph.nodes):
            if self._is_convolution(node) and (norm := self._norm_after(node)) is not None:
                self._fold(node, norm)
        self._overwrite_residuals()
        self.graph.lint()
        return self.new

    def _called(self, node: fx.Node) -> Any:
        """Return the module that the node calls, or None."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_convolution(self, node: fx.Node) -> bool:
        conv = self._called(node)
        plain = type(conv) in CONVOLUTIONS and not has_hooks(conv) and conv.padding_mode == "zeros"
        return plain and len(node.args) == 1 and not node.kwargs

    def _norm_after(self, conv: fx.Node) -> fx.Node | None:
        """Return the node of the norm that alone reads the convolution's output, if it can be folded, or None."""
        user = _only_user(conv)
        if user is None or user.args[:1] != (conv,):
            return None
        norm = self._called(user)
        if not isinstance(norm, nn.BatchNorm2d) or not _is_foldable(norm):
            return None
        takes_residual = type(norm) is BatchNormAct2d and set(user.kwargs) <= {"residual"}
        simple = len(user.args) == 1 and not user.kwargs
        return user if simple or (takes_residual and len(user.args) <= 2) else None

    def _fold(self, conv: fx.Node, norm: fx.Node) -> None:
        """Replace the two nodes, and the addition and the ReLU after them, by one."""
        module = self._called(norm)
        residual: Any = norm.kwargs.get("residual", norm.args[1] if len(norm.args) == 2 else None)
        relu = getattr(module, "act", None) == "relu" or type(getattr(module, "act", None)) is nn.ReLU
        chain = [conv, norm]
        # Without a residual the result is computed where the convolution was, else where the addition is.
        place = conv if residual is None else norm
        if residual is None and not relu:
            add = _only_user(norm)
            other = None if add is None else self._added(add, norm)
            if add is not None and other is not None and not self._written_between(conv, add):
                chain, place, residual = [*chain, add], add, other
            after = _only_user(chain[-1])
            if after is not None and self._is_relu(after):
                chain, relu = [*chain, after], True
        elif residual is not None and self._written_between(conv, norm):
            return
        name = str(conv.target)
        while name in self.new:  # the network calls the convolution more than once
            name += "_"
        self.new[name] = _combined(self._called(conv), module, relu, self.dtype)
        with self.graph.inserting_before(place):
            new = self.graph.call_module(name, (conv.args[0],) if residual is None else (conv.args[0], residual))
        self.nodes.add(new)
        chain[-1].replace_all_uses_with(new)
        for node in reversed(chain):
            self.graph.erase_node(node)

    def _added(self, add: fx.Node, y: fx.Node) -> fx.Node | None:
        """Return the other operand if the node adds y and another value, or None."""
        methods = add.op == "call_method" and add.target in ("add", "add_")
        if not (methods or (add.op == "call_function" and add.target in ADDS)) or len(add.args) != 2 or add.kwargs:
            return None
        first, second = add.args
        other = second if first is y else first
        in_place = add.target in (operator.iadd, "add_")
        return other if isinstance(other, fx.Node) and other is not y and not (in_place and first is other) else None

    def _written_between(self, conv: fx.Node, add: fx.Node) -> bool:
        """Return True if a node between the two may write to the convolution's input, which the addition would see."""
        node = conv.next
        while node is not add:
            if node not in self.nodes and self._may_write(node):
                return True
            node = node.next
        return False

    def _may_write(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(getattr(child, "inplace", False) for child in self._called(node).modules())
        name = str(getattr(node.target, "__name__", node.target))
        is_operator = name.startswith("i") and hasattr(operator, f"__{name}__")
        return is_operator or name.endswith("_") or name == "setitem" or not {"inplace", "out"}.isdisjoint(node.kwargs)

    def _is_relu(self, node: fx.Node) -> bool:
        module = self._called(node)
        if module is not None:
            return type(module) is nn.ReLU and not has_hooks(module)
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in RELUS and node.kwargs.keys() <= {"inplace"}

    def _overwrite_residuals(self) -> None:
        """Let each result be written to its residual if only folded convolutions read that, and none afterwards.

        The memory is then still in the cache, and the next layers need less of it: 1.2 times the speed for ResNet-20.
        """
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in self.nodes:
            if len(node.args) < 2:
                continue
            x, residual = node.args
            assert isinstance(residual, fx.Node)
            fresh = residual in self.nodes and residual is not x
            if fresh and all(user in self.nodes and order[user] <= order[node] for user in residual.users):
                node.kwargs = {"overwrite": True}


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the only node that uses the node's value, or None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_foldable(norm: nn.BatchNorm2d) -> bool:
    """Return True if the norm is an affine map with known factors, and perhaps a ReLU."""
    if has_hooks(norm) or norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    if is_timm_norm(type(norm)):
        drop, act = norm.drop, norm.act
        plain = type(drop) is nn.Identity and type(act) in (nn.Identity, nn.ReLU)
        return plain and not has_hooks(drop) and not has_hooks(act)  # type: ignore[arg-type]
    return type(norm) in (nn.BatchNorm2d, BatchNormAct2d)


@torch.no_grad()
def _combined(conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool, dtype: torch.dtype | None) -> FoldedConv2d:
    """Return the convolution that computes relu(norm(conv(x))). The scale and the bias are computed in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    dtype = dtype or conv.weight.dtype
    weight = conv.weight * scale.to(conv.weight.dtype)[:, None, None, None]
    return FoldedConv2d(conv, weight.to(dtype), bias.to(dtype), relu)
