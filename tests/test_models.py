"""The networks of the specification: their sizes, their equality with torchvision's, their rejections."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastres.models.blocks import SHORTCUTS, BasicBlock, Bottleneck, global_pool, norm_act
from fastres.models.mini import IdentityBlock
from fastres.models.registry import MODELS, build_model
from fastres.models.speedrun import EPSILON, PooledConv, SpeedStage, WhiteningConv
from fastres_kernels import BatchNormAct2d

LARGE = ("resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
TORCHVISION = [name for name in MODELS if hasattr(torchvision.models, name)]
SIDE = {"resnet18": 64, "resnet34": 64, "resnet50": 64}  # pixels; 33 for the big networks, which is odd at every stage


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, **options)


def shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(key, tensor.shape) for key, tensor in model.state_dict().items()]


def output_sizes(model: nn.Module, x: Tensor, *names: str) -> list[tuple[int, ...]]:
    """Return (C, H, W) of the outputs that the named modules of the model produce for x."""
    sizes: list[tuple[int, ...]] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, args, out: sizes.append(tuple(out.shape[1:])))
    model(x)
    return sizes


def error(a: Tensor, b: Tensor) -> float:
    """Return the error relative to the largest element: max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


# ---- the CIFAR family (section 1) --------------------------------------------------------------------------

PARAMETERS = {  # depth: (pad, maxpool_pad and plain; conv1x1)
    20: (269_722, 272_474),
    32: (464_154, 466_906),
    44: (658_586, 661_338),
    56: (853_018, 855_770),
    110: (1_727_962, 1_730_714),
    1202: (19_421_274, 19_424_026),
}


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110, pytest.param(1202, marks=pytest.mark.slow)])
def test_parameters_of_the_cifar_family(depth: int) -> None:
    parameterless, conv1x1 = PARAMETERS[depth]
    assert parameters(on_meta(f"resnet{depth}")) == parameterless
    assert parameters(on_meta(f"resnet{depth}", shortcut="pad")) == parameterless
    assert parameters(on_meta(f"resnet{depth}", shortcut="maxpool_pad")) == parameterless
    assert parameters(on_meta(f"plain{depth}")) == parameterless
    assert parameters(on_meta(f"resnet{depth}", shortcut="conv1x1")) == conv1x1


@pytest.mark.parametrize("n", [1, 3, 8, 25])
@pytest.mark.parametrize("plain", [False, True])
def test_depth_is_6n_plus_2(n: int, plain: bool) -> None:
    model = on_meta("cifar_resnet", blocks_per_stage=n, plain=plain)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == 6 * n + 2
    if plain or n not in (8, 25):  # resnet50 and resnet152 are ImageNet's; plain50 is not
        assert shapes(model) == shapes(on_meta(f"{'plain' if plain else 'resnet'}{6 * n + 2}"))


def test_stages_halve_the_image_and_double_the_width() -> None:
    x = torch.randn(2, 3, 32, 32)
    sizes = output_sizes(build_model("resnet20"), x, "bn1", "layer1", "layer2", "layer3")
    assert sizes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("name", ["resnet20", "plain20", "resnet18", "resnet50", "mini_resnet", "speed_resnet"])
def test_channels_classes_and_image_size_are_free(name: str) -> None:
    model = build_model(name, in_channels=1, num_classes=7)
    assert model(torch.randn(2, 1, 40, 36)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet20", "plain20", "resnet18", "resnet50", "mini_resnet"])
def test_initialisation_is_kaiming_normal_fan_out(name: str) -> None:
    model = build_model(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            scale = module.weight.std().item() / math.sqrt(2 / fan_out)
            assert scale == pytest.approx(1, abs=5 / math.sqrt(2 * module.weight.numel()))  # 5 sigma
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


# ---- shortcuts ---------------------------------------------------------------------------------------------


def test_pad_takes_every_second_row_and_column_and_appends_zero_channels() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3) + 1
    assert SHORTCUTS["pad"](1, 2, 2, nn.BatchNorm2d)(x).tolist() == [[[[1, 3], [7, 9]], [[0, 0], [0, 0]]]]


def test_maxpool_pad_takes_the_maximum_of_each_window_and_appends_zero_channels() -> None:
    x = -torch.arange(9.0).reshape(1, 1, 3, 3) - 1  # negative, because a window must not see zeros beyond the edge
    assert SHORTCUTS["maxpool_pad"](1, 2, 2, nn.BatchNorm2d)(x).tolist() == [[[[-1, -3], [-7, -9]], [[0, 0], [0, 0]]]]


DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pad": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 5)),
    "maxpool_pad": lambda x: F.max_pool2d(F.pad(x, (0, 0, 0, 0, 0, 5)), 2, 2, ceil_mode=True),
}


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (7, 8), (8, 1), (1, 1)])
@pytest.mark.parametrize("kind", DEFINITIONS)
def test_parameterless_shortcuts_equal_their_definitions(kind: str, size: tuple[int, int]) -> None:
    shortcut = SHORTCUTS[kind](3, 8, 2, nn.BatchNorm2d)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, expected = shortcut(x), DEFINITIONS[kind](x)
    assert torch.equal(ours, expected)
    probe = torch.randn_like(expected)
    assert torch.equal(*(torch.autograd.grad(y, x, probe)[0] for y in (ours, expected)))
    assert not shortcut.state_dict()


@pytest.mark.parametrize("kind", SHORTCUTS)
@pytest.mark.parametrize("side", [15, 16])
def test_every_shortcut_fits_its_block_at_odd_sizes(kind: str, side: int) -> None:
    block = BasicBlock(4, 8, 2, shortcut=kind)
    assert block(torch.randn(2, 4, side, side)).shape == (2, 8, 8, 8)


def test_conv1x1_has_torchvisions_keys() -> None:
    ours, theirs = BasicBlock(16, 32, 2), torchvision.models.resnet18().layer2[0]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [m.stride for m in ours.modules() if isinstance(m, nn.Conv2d)] == [(2, 2), (1, 1), (2, 2)]


def test_plain_nets_have_no_shortcut_in_any_block() -> None:
    blocks = [m for m in build_model("plain20").modules() if isinstance(m, BasicBlock)]
    assert len(blocks) == 9
    assert all(block.downsample is None for block in blocks)
    block = blocks[0].eval()
    x = torch.randn(2, 16, 8, 8)
    expected = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    assert torch.equal(block(x), expected)


def test_a_residual_block_adds_its_input() -> None:
    block = BasicBlock(16, 16).eval()
    x = torch.randn(2, 16, 8, 8)
    expected = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))) + x)
    assert torch.equal(block(x), expected)


# ---- the seam ----------------------------------------------------------------------------------------------


class FusingNorm(nn.BatchNorm2d):
    """A norm with norm_act's contract: relu(norm(x) + residual) while `act` is "relu", else norm(x)."""

    act = "relu"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return F.relu(y if residual is None else y + residual) if self.act == "relu" else y


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FusingNorm, BatchNormAct2d])
def test_norm_act_is_relu_of_norm_plus_residual(norm: type[nn.BatchNorm2d]) -> None:
    x, residual = torch.randn(2, 2, 4, 8, 6, dtype=torch.float64)
    y = F.batch_norm(x, None, None, training=True)
    module = norm(4).double()
    assert error(norm_act(module, x.clone()), F.relu(y)) < 1e-12
    kept = residual.clone()
    assert error(norm_act(module, x.clone(), residual), F.relu(y + residual)) < 1e-12
    assert torch.equal(residual, kept)  # an in-place operation never changes the input


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("resnet8", {"shortcut": kind}) for kind in SHORTCUTS),
        ("plain8", {}),
        ("resnet18", {"stem": "small"}),
        pytest.param("resnet50", {"stem": "small"}, marks=pytest.mark.slow),
        ("mini_resnet", {}),
        ("speed_resnet", {}),
    ],
)
@pytest.mark.parametrize("norm", [FusingNorm, BatchNormAct2d])
def test_a_norm_that_fuses_the_activation_changes_nothing_else(
    name: str, options: dict[str, Any], norm: type[nn.BatchNorm2d]
) -> None:
    """Logits, gradients and running statistics agree.

    If the norm forks, the gradients of skip connections arrive separately.
    """
    plain = build_model(name, **options).double()
    fusing = build_model(name, norm_layer=norm, **options).double()
    fusing.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    weights = torch.randn(2, 10, dtype=torch.float64)
    for training in (True, False):
        logits = [net.train(training)(x) for net in (fusing, plain)]
        assert error(*logits) < 1e-10
        gradients = [
            torch.autograd.grad((y * weights).sum(), [*net.parameters()])
            for y, net in zip(logits, (fusing, plain), strict=True)
        ]
        for (key, _), a, b in zip(plain.named_parameters(), *gradients, strict=True):
            # The second tolerance: a bias before BatchNorm has a gradient of zero up to rounding.
            assert error(a, b) < 1e-8 or max(a.abs().max(), b.abs().max()) < 1e-12, key
    for (key, a), b in zip(fusing.state_dict().items(), plain.state_dict().values(), strict=True):
        assert error(a.double(), b.double()) < 1e-10, key


def test_global_pool_is_the_mean_over_the_image() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert error(global_pool(x), F.adaptive_avg_pool2d(x, 1).flatten(1)) < 1e-14


# ---- the ImageNet family (section 2) -----------------------------------------------------------------------


def test_every_imagenet_net_has_a_torchvision_original() -> None:
    assert set(MODELS) - {"cifar_resnet", "mini_resnet", "speed_resnet"} == set(TORCHVISION)
    assert len(TORCHVISION) == 10


def assert_equal_nets(ours: nn.Module, theirs: nn.Module, side: int) -> None:
    """Assert equal logits and gradients in float64, in training and then with the statistics that training left.

    `ours` is built on the meta device and takes a copy of `theirs`, which saves its initialisation.
    """
    assert shapes(ours) == shapes(theirs)
    state = {key: tensor.clone() for key, tensor in theirs.double().state_dict().items()}
    ours.load_state_dict(state, strict=True, assign=True)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    for training in (True, False):
        gradients = []
        logits = []
        for model in (ours, theirs):
            leaf = x.clone().requires_grad_()
            logits.append(model.train(training)(leaf))
            loss = F.cross_entropy(logits[-1], torch.tensor([1, 3]))
            gradients.append(torch.autograd.grad(loss, [leaf, *model.parameters()]))
        assert error(*logits) < 1e-8
        for (name, _), a, b in zip([("x", x), *ours.named_parameters()], *gradients, strict=True):
            assert error(a, b) < 1e-8, name
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert error(a.double(), b.double()) < 1e-8, key  # running statistics too
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in TORCHVISION]
)
def test_equals_torchvision(name: str) -> None:
    theirs = torchvision.models.get_model(name, num_classes=5)
    assert_equal_nets(on_meta(name, num_classes=5), theirs, SIDE.get(name, 33))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        pytest.param("resnet50", {"replace_stride_with_dilation": [True, False, True]}, marks=pytest.mark.slow),
        ("resnet50", {"groups": 2, "width_per_group": 32}),
        ("resnet18", {"norm_layer": partial(nn.GroupNorm, 8)}),
        ("resnet18", {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.3)}),
    ],
)
def test_torchvisions_options_have_the_same_meaning(name: str, options: dict[str, Any]) -> None:
    theirs = torchvision.models.get_model(name, num_classes=5, **options)
    assert_equal_nets(on_meta(name, num_classes=5, **options), theirs, 33)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual_starts_every_block_as_its_shortcut(name: str) -> None:
    ours = build_model(name, zero_init_residual=True)
    theirs = torchvision.models.get_model(name, zero_init_residual=True)

    def zeroed(model: nn.Module) -> list[str]:
        return [key for key, p in model.named_parameters() if key.endswith("weight") and not p.any()]

    assert zeroed(ours) == zeroed(theirs) != []
    assert not zeroed(build_model(name))


def test_v1_puts_the_stride_on_the_first_1x1() -> None:
    ours = on_meta("resnet50", num_classes=5, v1=True)
    theirs = torchvision.models.resnet50(num_classes=5)
    for block in theirs.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    assert_equal_nets(ours, theirs, 33)


def test_v1_is_the_same_net_without_bottlenecks() -> None:
    strides = [
        [m.stride for m in on_meta("resnet18", v1=v1).modules() if isinstance(m, nn.Conv2d)] for v1 in (False, True)
    ]
    assert strides[0] == strides[1]


def test_small_stem_keeps_the_resolution_of_32x32() -> None:
    model = build_model("resnet18", stem="small").eval()
    assert [key for key, _ in shapes(model)] == [key for key, _ in shapes(build_model("resnet18"))]
    assert model.get_parameter("conv1.weight").shape == (64, 3, 3, 3)
    sizes = output_sizes(model, torch.randn(1, 3, 32, 32), "layer1", "layer2", "layer3", "layer4")
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_resnet50_and_152_always_mean_imagenets() -> None:
    assert parameters(on_meta("resnet50", num_classes=1000)) == 25_557_032
    assert parameters(on_meta("resnet152", num_classes=1000)) == 60_192_808


# ---- the mini ResNet (section 3) ---------------------------------------------------------------------------


def test_mini_resnet_has_152202_parameters_and_pools_28_to_9() -> None:
    model = build_model("mini_resnet", in_channels=1, num_classes=10)
    assert parameters(model) == 152_202
    sizes = output_sizes(model, torch.randn(2, 1, 28, 28), "bn1", "maxpool", "layer1")
    assert sizes == [(64, 28, 28), (64, 9, 9), (64, 9, 9)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
def test_identity_block_adds_its_input_at_any_kernel_size(kernel_size: int) -> None:
    block = IdentityBlock(6, kernel_size).eval()
    assert block.conv1.bias is not None
    x = torch.randn(2, 6, 9, 8)
    expected = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))) + x)
    assert block(x).shape == x.shape
    assert torch.equal(block(x), expected)


# ---- the speed-run's network ---------------------------------------------------------------------------------


def images_of_smooth_noise(n: int = 64, channels: int = 3, side: int = 12) -> Tensor:
    """Return (n, channels, side, side) float64 images with a mean and correlated neighbours and channels."""
    noise = torch.randn(n, channels, side + 2, side + 2, dtype=torch.float64)
    return F.avg_pool2d(noise + noise.roll(1, 1), 3, 1) + 0.3


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_patches_have_unit_covariance(channels: int) -> None:
    images = images_of_smooth_noise(channels=channels)
    stem = WhiteningConv(channels, 2).double()
    stem.fit(images, epsilon=0.0)
    whitened = stem(images).permute(1, 0, 2, 3).flatten(1)  # a row for each filter
    identity = torch.eye(4 * channels, dtype=torch.float64)
    assert error(whitened.cov(), torch.kron(torch.tensor([[1, -1], [-1, 1]]), identity)) < 1e-10


def test_whitening_does_not_amplify_directions_that_hardly_vary() -> None:
    images = images_of_smooth_noise()
    images[:, 2] = images[:, 1]  # four of the twelve directions are constant
    model = build_model("speed_resnet").double()
    model.whiten(images)
    variances = F.unfold(images, 2).transpose(1, 2).flatten(0, 1).T.cov().svd()[1].repeat(2)
    expected = variances / (variances + EPSILON)
    assert error(model.conv1(images).var((0, 2, 3)).sort()[0], expected.sort()[0]) < 1e-10
    assert expected.min() < 1e-10


def test_the_stem_is_frozen_and_the_same_for_the_same_images() -> None:
    images, stems = images_of_smooth_noise(), []
    for _ in range(2):  # initialised differently
        model = build_model("speed_resnet")
        before = model.conv1.weight.clone()
        model.whiten(images.float())
        assert not torch.equal(model.conv1.weight, before)
        stems.append(model.conv1.weight)
    assert torch.equal(*stems)
    assert "conv1.weight" in model.state_dict()
    assert "conv1.weight" not in dict(model.named_parameters())  # no optimizer decays it


def test_the_speed_nets_convolutions_start_as_the_identity() -> None:
    for stage in build_model("speed_resnet", widths=[64, 96]).stages:
        for conv in (stage.conv1, stage.conv2):
            x = torch.randn(2, conv.in_channels, 8, 8)
            expected = F.max_pool2d(x, 2) if isinstance(conv, PooledConv) else x
            assert torch.equal(conv(x)[:, : conv.in_channels], expected)
            assert conv.in_channels == conv.out_channels or conv(x)[:, conv.in_channels :].std() > 0.1


def test_the_speed_nets_sizes() -> None:
    model = build_model("speed_resnet")
    assert parameters(model) == 1_160_960
    names = ("conv1", "stages.0", "stages.1", "stages.2")
    for side, sides in ((32, (31, 15, 7, 4)), (8, (7, 3, 1, 1))):
        channels = (24, 64, 128, 256)
        expected = [(c, s, s) for c, s in zip(channels, sides, strict=True)]
        assert output_sizes(build_model("speed_resnet"), torch.randn(2, 3, side, side), *names) == expected


@pytest.mark.parametrize("norm", ["torch", "fused"])
def test_the_speed_nets_statistics_follow_norm_momentum(norm: str) -> None:
    x, means = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last), []
    for options in ({}, {"norm_momentum": 0.4}):
        torch.manual_seed(0)
        model = build_model("speed_resnet", widths=[8, 8], norm=norm, **options)
        model.to(memory_format=torch.channels_last)(x)
        means.append(torch.cat([value for key, value in model.state_dict().items() if "running_mean" in key]))
    assert error(means[1], 4 * means[0]) < 1e-6


# ---- memory format and compilation -------------------------------------------------------------------------

FAMILIES: list[Any] = [
    *(("resnet8", {"shortcut": kind}) for kind in SHORTCUTS),
    ("plain8", {}),
    ("resnet18", {}),
    ("resnet50", {}),
    pytest.param("resnet50", {"stem": "small", "v1": True}, marks=pytest.mark.slow),
    pytest.param("resnet50", {"replace_stride_with_dilation": [False, True, True]}, marks=pytest.mark.slow),
    pytest.param("resnext50_32x4d", {}, marks=pytest.mark.slow),
    ("mini_resnet", {}),
    ("speed_resnet", {}),
    ("speed_resnet", {"widths": [8, 16]}),
]


@pytest.mark.parametrize("norm", ["torch", "fused"])
@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_channels_last_forward_and_backward(name: str, options: dict[str, Any], norm: str) -> None:
    # float64 uses the fused norm's reference, because a ResNet-50 takes minutes in the interpreter.
    model = build_model(name, norm=norm, **options).double().to(memory_format=torch.channels_last)
    wrong: list[str] = []
    checked = 0

    def check(what: str, tensor: Tensor) -> None:
        nonlocal checked
        checked += 1
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            wrong.append(f"{what} {tuple(tensor.shape)} {tensor.stride()}")

    def hook(name: str, module: nn.Module, args: object, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        check(f"{name} output", out)
        out.register_hook(partial(check, f"{name} gradient"))

    kinds = (nn.Conv2d, nn.BatchNorm2d, BasicBlock, Bottleneck, IdentityBlock, SpeedStage)
    watched = {key: module for key, module in model.named_modules() if isinstance(module, kinds)}
    for key, module in watched.items():
        module.register_forward_hook(partial(hook, key))
    x = torch.randn(2, 3, 65, 65).double().to(memory_format=torch.channels_last)  # odd; 3 pixels remain at the end
    model(x).square().sum().backward()
    assert wrong == []
    assert checked == 2 * len(watched)


@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_compiles_without_graph_breaks(name: str, options: dict[str, Any]) -> None:
    model = build_model(name, **options)
    x, y = torch.randn(2, 3, 33, 33), torch.tensor([1, 3])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    torch._dynamo.reset()
    eager, compiled = loss(x, y), torch.compile(loss, backend="eager", fullgraph=True)(x, y)
    assert torch.equal(eager, compiled)
    compiled.backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet21", {}, ["'resnet21'", "did you mean 'resnet20'", "6n+2"]),
        ("resnet2", {}, ["'resnet2'", "'resnet8'"]),
        ("plain55", {}, ["'plain55'", "'plain56'"]),
        ("resnet020", {}, ["'resnet020'", "'resnet20'"]),
        ("ResNet-18", {}, ["'ResNet-18'", "'resnet18'"]),
        ("wide_resnet50", {}, ["'wide_resnet50'", "'wide_resnet50_2'"]),
        ("vgg16", {}, ["'vgg16'", "choose from", "resnext50_32x4d", "mini_resnet"]),
        ("resnet20", {"shortcut": "padd"}, ["'padd'", "did you mean 'pad'", "maxpool_pad", "conv1x1"]),
        ("plain20", {"shortcut": "pad"}, ["plain20", "shortcut", "leave out"]),
        ("cifar_resnet", {"blocks_per_stage": 3, "plain": True, "shortcut": "pad"}, ["plain", "shortcut"]),
        ("cifar_resnet", {}, ["cifar_resnet", "blocks_per_stage"]),
        ("cifar_resnet", {"blocks_per_stage": 0}, ["blocks_per_stage", "at least 1", "0"]),
        ("cifar_resnet", {"blocks_per_stage": 3, "plain": "no"}, ["plain", "true or false", "'no'"]),
        ("resnet20", {"blocks_per_stage": 5}, ["resnet20", "'blocks_per_stage'", "shortcut"]),
        ("resnet20", {"plain": True}, ["resnet20", "plain=True"]),
        ("resnet20", {"stem": "small"}, ["resnet20", "'stem'"]),
        ("resnet50", {"shortcut": "pad"}, ["resnet50", "'shortcut'", "stem"]),
        ("resnet50", {"zero_init": True}, ["'zero_init'", "'zero_init_residual'"]),
        ("resnet50", {"stem": "smal"}, ["'smal'", "'small'", "imagenet"]),
        ("resnet50", {"groups": 3, "width_per_group": 0}, ["width_per_group", "at least 1"]),
        ("resnet50", {"replace_stride_with_dilation": [True]}, ["three booleans", "[True]"]),
        ("resnet18", {"groups": 2}, ["BasicBlock", "groups", "2"]),
        ("resnet18", {"width_per_group": 128}, ["BasicBlock", "base width", "128"]),
        ("resnet34", {"replace_stride_with_dilation": [False, False, True]}, ["BasicBlock", "dilation"]),
        ("resnext50_32x4d", {"groups": 16}, ["resnext50_32x4d", "groups=32", "groups=16"]),
        ("mini_resnet", {"shortcut": "pad"}, ["mini_resnet", "'shortcut'"]),
        ("speed_resnet", {"widths": 64}, ["widths", "whole number", "64"]),
        ("speed_resnet", {"widths": []}, ["widths", "[]"]),
        ("speed_resnet", {"widths": [64, 0]}, ["widths", "[64, 0]"]),
        ("speed_resnet", {"norm_momentum": 0}, ["norm_momentum", "above 0", "not 0"]),
        ("speed_resnet", {"norm_momentum": True}, ["norm_momentum", "True"]),
        ("speed_resnet", {"depth": 9}, ["speed_resnet", "'depth'", "widths"]),
        ("resnet20", {"norm": "batch"}, ["norm", "'batch'", "torch"]),
        ("resnet20", {"norm_layer": 3}, ["norm_layer", "3"]),
        ("resnet20", {"num_classes": 0}, ["num_classes", "at least 1", "0"]),
        ("resnet20", {"in_channels": "3"}, ["in_channels", "'3'"]),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as rejected:
        on_meta(name, **options)
    message = str(rejected.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_an_option_may_repeat_what_the_name_fixes() -> None:
    assert parameters(on_meta("resnext50_32x4d", groups=32, width_per_group=4)) == parameters(
        on_meta("resnet50", groups=32, width_per_group=4)
    )
