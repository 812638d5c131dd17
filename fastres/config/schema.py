"""Run configuration: frozen dataclasses whose fields define the command line.

The defaults are He et al.'s CIFAR-10 schedule (2015, section 4.2), so a recipe states only what differs from it.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

DEFAULT_RECIPE = "cifar10-resnet20"
LOCAL_FIELDS = ("dir", "resume")  # of RunConfig: where a run is kept is not part of what it is


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: str = "resnet20"
    """Network: resnetN or plainN (N = 6n+2, CIFAR family), resnet18 to resnet152, resnext50_32x4d,
    resnext101_32x8d, resnext101_64x4d, wide_resnet50_2, wide_resnet101_2 (ImageNet family), cifar_resnet
    (with options.blocks_per_stage), mini_resnet, speed_resnet (with options.widths)."""

    shortcut: Literal["pad", "maxpool_pad", "conv1x1"] | None = None
    """Shortcut of the CIFAR family where the shape changes (null: the paper's, pad)."""

    norm: Literal["auto", "torch", "fused", "apex"] = "auto"
    """BatchNorm implementation; the state_dict's keys are the same under each. fused: with ReLU and addition, in Triton
    on a GPU and in C++ on a CPU with avx512_bf16 and no AMX; auto takes it where it was measured faster, and with
    sync_norm."""

    sync_norm: bool = False
    """Share BatchNorm statistics between processes (SyncBatchNorm)."""

    num_classes: PositiveInt | None = None
    """Outputs of the head (null: as many as the data has classes)."""

    weights: str | None = None
    """File to start from: .safetensors or a torchvision state_dict; a head of another size is replaced."""

    # Plain values, not Any: for Any jsonargparse takes {class_path: ...} as a class to import and to call.
    options: dict[str, bool | int | float | list[bool | int] | str | None] = field(default_factory=dict)
    """Further options of build_model, such as {stem: small, zero_init_residual: true}."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The samples and how they reach the device."""

    source: Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "digits", "imagefolder", "synthetic"] = (
        "cifar10"
    )
    """Data set. digits is built in: scikit-learn's 1,797 handwritten digits, 8x8."""

    root: str = "data"
    """Folder of the data set: torchvision's layout, or train/CLASS/* and test/CLASS/* for imagefolder."""

    mirror: str | None = None
    """Base URL (http, https or file) to download from, in place of the data set's own server."""

    download: bool = True
    """Download what is not under root; checksummed."""

    cache: str | None = None
    """Folder where decoded image folders are kept for the resident loader (null: fastres in the user's cache folder,
    $XDG_CACHE_HOME or ~/.cache)."""

    skip_bad: bool = False
    """Leave out the files of an image folder that cannot be decoded, and without resized_crop those of another size
    than most; all are tried at the first start."""

    validation: NonNegativeInt = 0
    """Training samples held out for the evaluation curve by a fixed seed (0: the curve uses the test set)."""

    loader: Literal["resident", "dali", "dataloader"] = "resident"
    """resident: the data set lives on the device, augmentation runs there; dali: NVIDIA's, on a GPU where there is one;
    dataloader: torch's, the baseline."""

    augment: Literal["crop", "resized_crop", "none"] = "crop"
    """crop: zero-pad by data.pad, then a random crop; resized_crop: random area and aspect (ImageNet)."""

    pad: NonNegativeInt = 4
    """Pixels added to each side before the random crop."""

    pad_mode: Literal["zero", "reflect"] = "zero"
    """What they are: black, or the image mirrored around its outermost pixels."""

    flip: bool | Literal["alternating"] = True
    """Horizontal flip with probability one half; alternating: a random half in the first epoch, then by turns."""

    cutout: NonNegativeInt = 0
    """Side in pixels of a square that is blanked around a random pixel (0: none; the paper has 16 for CIFAR-10)."""

    mixup: NonNegativeFloat = 0.0
    """Blend pairs of images and their labels by shares from Beta(mixup, mixup) (0: no; the paper has 1)."""

    cutmix: NonNegativeFloat = 0.0
    """Paste a part of one image into another, labels by area, from Beta(cutmix, cutmix) (0: no; the paper has 1).
    With mixup too, a coin decides for each image."""

    image_size: PositiveInt | None = None
    """Side in pixels that the network sees (null: the data's own, 32 of synthetic; needed for resized_crop)."""

    synthetic_samples: PositiveInt = 2048
    """Training samples of the synthetic source (a quarter as many for test)."""

    workers: NonNegativeInt = 2
    """Worker processes per rank of the dataloader; threads of DALI, and of decoding for the resident loader."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in optimizer steps, never in epochs."""

    steps: NonNegativeInt = 64_000
    """Optimizer steps of the run."""

    batch_size: PositiveInt = 128
    """Samples of one step over all processes."""

    accumulate: PositiveInt = 1
    """Parts in which each process takes its share of a batch, one after another, for the memory of one of them. The
    gradient is that of the whole batch; BatchNorm sees one part at a time, as it sees one process's."""

    eval_every: PositiveInt = 1_000
    """Steps between evaluations; the last step is always evaluated."""

    eval_batch_size: PositiveInt = 1_000
    """Samples of one evaluation batch over all processes; it changes the speed, not the figures."""

    eval_mirrored: bool = False
    """Evaluate by the mean of the logits of an image and of its mirror image (test-time augmentation); the summary's
    test_views is then 2."""

    log_every: PositiveInt = 100
    """Steps between lines of metrics; the device is synchronised only there."""

    label_smoothing: NonNegativeFloat = 0.0
    """Label smoothing of the training loss, in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer; learning rates are those of the global batch."""

    name: Literal["sgd", "muon", "apex_sgd"] = "sgd"
    """sgd is torch's, fused; muon is Muon (Jordan et al. 2024) for the weights of convolutions, and sgd for the rest;
    apex_sgd is apex's FusedSGD, where a genuine apex is installed."""

    lr: PositiveFloat = 0.1
    """Peak learning rate."""

    momentum: NonNegativeFloat = 0.9
    """Momentum, in [0, 1)."""

    nesterov: bool = False
    """Nesterov's momentum."""

    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty added to the gradient."""

    decay_norm_and_bias: bool = True
    """Decay BatchNorm parameters and biases too, as He et al. do."""

    norm_bias_lr_scale: PositiveFloat = 1.0
    """BatchNorm's biases learn at this many times lr (64 in cifar10-airbench); decayed, they are so no faster."""

    muon_lr: PositiveFloat = 0.24
    """Peak learning rate of the weights that muon takes: the length of a step, whatever the gradient."""

    muon_momentum: NonNegativeFloat = 0.6
    """Their momentum, Nesterov's, in [0, 1). They are not decayed: their norm stays the same."""

    scale_lr: bool = False
    """Multiply lr by the number of processes (for a batch size that was scaled likewise)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate as a pure function of the step."""

    name: Literal["multistep", "cosine", "triangular", "constant"] = "multistep"
    """multistep: lr times factor at each milestone; cosine and triangular: to final_scale at the last step."""

    milestones: tuple[int, ...] = (32_000, 48_000)
    """Steps at which multistep multiplies the learning rate by factor."""

    factor: PositiveFloat = 0.1
    """What multistep multiplies by."""

    warmup: Literal["linear", "constant"] = "linear"
    """Shape of the first warmup_steps: linear from warmup_scale to 1, or constant at warmup_scale."""

    warmup_steps: NonNegativeInt = 0
    """Steps of warm-up; triangular peaks here."""

    warmup_scale: NonNegativeFloat = 0.0
    """Share of lr at which the warm-up starts."""

    final_scale: NonNegativeFloat = 0.0
    """Share of lr that cosine and triangular reach at the end."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the step runs. auto falls back with a printed reason; an explicit value that cannot be had is refused."""

    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"] = "auto"
    """auto is bf16 where the device computes in it, else fp32; fp16 scales the loss; fp64 is for comparisons."""

    channels_last: bool = True
    """Keep activations and weights in channels-last order, checked forward and backward."""

    compile: bool | Literal["auto"] = "auto"
    """torch.compile of forward and loss without graph breaks; auto does so on a GPU where Triton is there."""

    cuda_graph: bool | Literal["auto"] = "auto"
    """Replay the whole step, its batch included, as one CUDA graph; auto does so on a GPU with data.loader resident,
    one process and optim.name sgd or muon."""

    deterministic: bool = False
    """Bitwise equal runs on the same device (on a CPU they are so anyway)."""

    conv: Literal["auto", "torch", "cpp"] = "auto"
    """3x3 convolutions of up to 64 channels in training. cpp: this project's C++ kernels, for a CPU with avx512_bf16
    in bf16; auto takes them if they were measured faster."""

    compress_gradients: bool = False
    """Processes exchange their gradients in bf16, half the bytes; refused where the backend cannot add bf16."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run is kept and how it goes on."""

    dir: str | None = None
    """Folder of the run (null: runs/RECIPE)."""

    seed: NonNegativeInt = 0
    """Seed of weights, order and augmentation."""

    resume: str = "auto"
    """auto: continue a run of the same config; never: refuse a folder that holds a run; or a checkpoint's path."""

    checkpoint_every: PositiveInt = 2_000
    """Steps between checkpoints; the last step is always kept."""

    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep."""

    tensorboard: bool = False
    """Write TensorBoard events too (extra: tensorboard)."""

    wandb: bool = False
    """Log to Weights & Biases too (extra: wandb)."""

    timeout_s: PositiveFloat = 600.0
    """Seconds without a step after which several processes give up, naming the one that hangs."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `recipe` names the file that the rest started from."""

    recipe: str = DEFAULT_RECIPE
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS = [field.name for field in dataclasses.fields(Config) if field.name != "recipe"]
FIELDS = [  # `section.field`, each
    f"{section}.{field.name}"
    for section in SECTIONS
    for field in dataclasses.fields(typing.get_type_hints(Config)[section])
]


def model_options(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of build_model besides the name and the sizes that come from the data."""
    return model.options | ({} if model.shortcut is None else {"shortcut": model.shortcut})


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dicts and lists, without the fields that say where the run is kept."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in LOCAL_FIELDS:
        del plain["run"][name]
    return plain


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML, which --config accepts to repeat the run."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differences between two to_dict() as `section.field: old -> new`; the recipe's name does not count.

    A field that an earlier version did not write had what is now the default.
    """
    lines, defaults = [], to_dict(Config())
    for section in SECTIONS:
        a, b = defaults[section] | old.get(section, {}), new.get(section, {})
        for name in sorted(set(a) | set(b)):
            if a.get(name) != b.get(name):
                lines.append(f"{section}.{name}: {a.get(name)} -> {b.get(name)}")
    return lines
