"""Run configuration: frozen dataclasses whose fields define the command line.

The defaults are He et al.'s CIFAR-10 schedule (2015, section 4.2), so a recipe states only its differences.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fastres.config.formats import write_yaml
from fastres.config.length import Length
from fastres.utils.errors import UsageError, expand_user

DEFAULT_RECIPE = "cifar10-resnet20"
# Fields that do not describe the run itself, so that no file of a run has them.
LOCAL_FIELDS = {"model": ("trust_code",), "run": ("dir", "resume")}
PATHS = {"model": ("weights",), "data": ("root", "cache"), "run": ("dir", "resume")}  # ~ in these fields is expanded

# Fields that a resumed run may change, with the reason why the run stays the same run. A path is not compared:
# data.root may be spelled in many ways and data may move, so only the data itself can tell whether it is the same.
MAY_CHANGE = {
    "data.root": "a place; the data decides, whatever its path",
    "data.mirror": "a place; checksums decide which files are accepted",
    "data.download": "the same files, downloaded or not",
    "data.cache": "a place of copies, which fingerprints compare with the data",
    "data.workers": "batches are functions of (seed, step), whoever prepares them",
    "train.eval_batch_size": "every sample is evaluated once, whatever its batch",
    "train.log_every": "rows of the log; the curve has steps of its own, train.eval_every",
    "run.checkpoint_every": "steps at which the state is saved, which does not change it",
    "run.keep_checkpoints": "files that are kept",
    "run.trackers": "copies of the metrics",
    "run.project": "a name for copies of the metrics",
    "run.tensorboard": "a copy of the metrics",
    "run.wandb": "a copy of the metrics",
    "run.timeout_s": "the end of a run that hangs",
}


def expand_paths(section: Any) -> None:
    """Expand ~ in the PATHS of a new section, wherever their values come from. Raise UsageError for an unknown user."""
    section_name = type(section).__name__.removesuffix("Config").lower()
    for name in PATHS[section_name]:
        if isinstance(value := getattr(section, name), str):
            try:
                object.__setattr__(section, name, expand_user(value))
            except UsageError as error:
                raise UsageError(f"--{section_name}.{name} {error}") from None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: str = "resnet20"
    """Network: resnetN or plainN (N = 6n+2, CIFAR family), resnet18 to resnet152, resnext50_32x4d,
    resnext101_32x8d, resnext101_64x4d, wide_resnet50_2, wide_resnet101_2 (ImageNet family), cifar_resnet
    (with options.blocks_per_stage), mini_resnet, speed_resnet (with options.widths); torchvision/NAME, timm/NAME, or
    package.module:function, which returns a network for num_classes and the options."""

    trust_code: bool = False
    """Allow model.name package.module:function to import that module, which runs its code. Only the command line can
    allow it, in every command that builds the network."""

    shortcut: Literal["pad", "maxpool_pad", "conv1x1"] | None = None
    """Shortcut of the CIFAR family for blocks that change the shape (null: pad, as in the paper)."""

    norm: Literal["auto", "torch", "fused", "apex"] = "auto"
    """BatchNorm implementation; all have the same state_dict keys. fused computes ReLU and the addition too, in Triton
    on a GPU and in C++ on a CPU with AVX-512, AVX2 or NEON; auto chooses it for the shapes for which it was measured
    faster, and always with sync_norm."""

    sync_norm: bool = False
    """Compute BatchNorm statistics over the global batch of all processes (SyncBatchNorm)."""

    num_classes: PositiveInt | None = None
    """Outputs of the head (null: the number of classes in the data)."""

    weights: str | None = None
    """Initial weights: a safetensors file, a state_dict saved by torch (also in a checkpoint), a run's folder, or the
    name of torchvision's weights for the network, such as DEFAULT or IMAGENET1K_V2, which are downloaded. A head of
    another size is replaced."""

    freeze: list[str] | str | None = None
    """What is not trained: backbone for everything but the head, or modules such as [conv1, bn1, layer1]. Frozen
    BatchNorms normalise with their running statistics, which stay as they are."""

    # Plain values, not Any: for Any, jsonargparse would import and call a class named by {class_path: ...}.
    options: dict[str, bool | int | float | list[bool | int] | str | None] = field(default_factory=dict)
    """Further options of build_model, such as {stem: small, zero_init_residual: true}; or one by one, such as
    --model.options.stem small."""

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set and how its samples reach the device."""

    source: Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "digits", "imagefolder", "synthetic", "arrays"] = (
        "cifar10"
    )
    """Data set. digits is built in: scikit-learn's 1,797 handwritten digits, 8x8. arrays are given in Python, to
    fastres.fit."""

    root: str = "data"
    """Folder of the data set, in torchvision's layout, or with train/CLASS/* and test/CLASS/* for imagefolder."""

    mirror: str | None = None
    """Base URL (http, https or file) to download from instead of the data set's own server."""

    download: bool = True
    """Download files that are missing under root and verify their checksums."""

    cache: str | None = None
    """Folder for the cache of decoded image folders, used by the resident loader (null: fastres in the user's cache
    folder, which is $XDG_CACHE_HOME or ~/.cache on Linux)."""

    skip_bad: bool = False
    """Skip image files that cannot be decoded. Without resized_crop, also skip images whose size differs from the most
    common one. The first run decodes every file to find them."""

    exif: bool = False
    """Turn image files upright, by the orientation in their EXIF. The default ignores it, as torchvision's ImageFolder
    does."""

    validation: NonNegativeInt = 0
    """Training samples to hold out, by a fixed seed, for the evaluation curve (0: the curve uses the test set)."""

    loader: Literal["resident", "dali", "dataloader"] = "resident"
    """resident keeps the data set on the device and augments there; dali is NVIDIA's, on a GPU if there is one;
    dataloader is torch's, the baseline."""

    augment: Literal["crop", "resized_crop", "none"] = "crop"
    """crop pads by data.pad and takes a random crop; resized_crop takes a random area and aspect ratio (ImageNet)."""

    pad: NonNegativeInt = 4
    """Pixels to add on each side before the random crop."""

    pad_mode: Literal["zero", "reflect"] = "zero"
    """Padding content: black pixels, or the image reflected at its border."""

    flip: bool | Literal["alternating"] = True
    """Flip horizontally with probability one half; alternating flips a random half of the images in the
    first epoch, the other half in the second, and so on."""

    cutout: NonNegativeInt = 0
    """Side in pixels of the square to blank around a random pixel (0: none; the paper uses 16 for CIFAR-10)."""

    mixup: NonNegativeFloat = 0.0
    """Blend pairs of images and their labels with weights from Beta(mixup, mixup) (0: off; the paper uses 1)."""

    cutmix: NonNegativeFloat = 0.0
    """Paste a box of one image into another and mix the labels by area, from Beta(cutmix, cutmix) (0: off; the paper
    uses 1). If mixup is on too, a coin toss decides for each image."""

    class_weights: Literal["balanced"] | list[PositiveFloat] | None = None
    """Weights of the classes in the training loss, for classes of uneven size: balanced for the inverse of the number
    of a class's samples, or one number for each class, in order. They are scaled to a mean of 1 over the samples."""

    image_size: PositiveInt | None = None
    """Side in pixels of the network's input (null: the side of the data's images, 32 for synthetic; required for
    resized_crop)."""

    synthetic_samples: PositiveInt = 2048
    """Training samples of the synthetic source (a quarter as many for test)."""

    workers: NonNegativeInt = 2
    """Worker processes per rank for the dataloader; threads for DALI and for decoding."""

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the run, in optimizer steps."""

    steps: NonNegativeInt = 64_000
    """Optimizer steps of the run. Milestones and warm-up steps that the recipe or an earlier file has set are scaled
    with it."""

    epochs: PositiveFloat | None = None
    """Length of the run in epochs, instead of train.steps: passes over the training samples, such as 10 or 0.5 (null:
    train.steps). It becomes train.steps once the data is open."""

    batch_size: PositiveInt = 128
    """Global batch size: samples of one step over all processes."""

    accumulate: PositiveInt = 1
    """Micro-batches that each process splits its batch into, so that only one has to fit in memory. The gradient is
    that of the global batch; BatchNorm sees one micro-batch at a time."""

    eval_every: PositiveInt = 1_000
    """Steps between evaluations; the last step is always evaluated."""

    eval_batch_size: PositiveInt = 1_000
    """Samples of one evaluation batch over all processes; it changes the speed, not the result."""

    eval_mirrored: bool = False
    """Average the logits of each image and its mirror image in evaluations (test-time augmentation); test_views in
    the summary is then 2."""

    log_every: PositiveInt = 100
    """Steps between log lines; the device is synchronised only there."""

    label_smoothing: NonNegativeFloat = 0.0
    """Label smoothing of the training loss, in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. Learning rates are for the global batch."""

    name: Literal["sgd", "muon", "apex_sgd"] = "sgd"
    """sgd is torch's fused SGD; muon is Muon (Jordan et al. 2024) for the weights of convolutions and sgd for the rest;
    apex_sgd is apex's FusedSGD, if a genuine apex is installed."""

    lr: PositiveFloat = 0.1
    """Peak learning rate."""

    momentum: NonNegativeFloat = 0.9
    """Momentum, in [0, 1)."""

    nesterov: bool = False
    """Nesterov's momentum."""

    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty added to the gradient."""

    decay_norm_and_bias: bool = True
    """Apply weight decay to BatchNorm parameters and biases too, as He et al. do."""

    norm_bias_lr_scale: PositiveFloat = 1.0
    """Learning-rate multiplier for BatchNorm biases (64 in cifar10-airbench). Their weight decay is divided by the same
    factor, so the decay per step is unchanged."""

    muon_lr: PositiveFloat = 0.24
    """Peak learning rate of the weights that muon updates. It alone sets the length of a step."""

    muon_momentum: NonNegativeFloat = 0.6
    """Nesterov momentum of the weights that muon updates, in [0, 1). They have no weight decay, because their norm is
    fixed."""

    scale_lr: bool = False
    """Multiply lr by the number of processes. Use it only if you multiplied train.batch_size by it too."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate as a pure function of the step."""

    name: Literal["multistep", "cosine", "triangular", "constant"] = "multistep"
    """multistep multiplies lr by factor at each milestone; cosine and triangular reach final_scale at the last step."""

    milestones: tuple[int, ...] = (32_000, 48_000)
    """Steps at which multistep multiplies the learning rate by factor, such as [3900,5850]."""

    factor: PositiveFloat = 0.1
    """Factor of multistep."""

    warmup: Literal["linear", "constant"] = "linear"
    """Shape of the first warmup_steps: linear from warmup_scale to 1, or constant at warmup_scale."""

    warmup_steps: NonNegativeInt = 0
    """Steps of warm-up; triangular has its peak at their end."""

    warmup_scale: NonNegativeFloat = 0.0
    """Fraction of lr at which the warm-up starts."""

    final_scale: NonNegativeFloat = 0.0
    """Fraction of lr that cosine and triangular reach at the end."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Execution of the step. auto falls back and logs the reason; an explicit value that is unavailable is rejected."""

    device: str = "auto"
    """Device: auto, cpu, cuda, or cuda:N."""

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"] = "auto"
    """auto is bf16 if that is faster than fp32 on the device, otherwise fp32; fp16 scales the loss; fp64 is for
    comparisons."""

    channels_last: bool = True
    """Keep activations and weights in channels-last order; a check at the start covers forward and backward."""

    compile: bool | Literal["auto"] = "auto"
    """Compile forward and loss with torch.compile, without graph breaks; auto compiles on a GPU with Triton."""

    cuda_graph: bool | Literal["auto"] = "auto"
    """Replay the whole step, including its batch, as one CUDA graph; auto enables it on a GPU with data.loader
    resident, one process and optim.name sgd or muon."""

    deterministic: bool = False
    """Make runs on the same device bitwise identical (on a CPU they always are)."""

    conv: Literal["auto", "torch", "cpp"] = "auto"
    """Implementation of 3x3 convolutions. cpp: this project's C++ kernels where they were measured faster, in fp32 on a
    CPU with AVX2 or AVX-512, and in bf16 with avx512_bf16 and no AMX; auto chooses them on such a CPU."""

    compress_gradients: bool = False
    """All-reduce gradients in bf16, which halves the bytes; rejected if the backend cannot add bf16."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Folder, seed, checkpoints and logging of the run."""

    dir: str | None = None
    """Folder of the run (null: runs/RECIPE)."""

    seed: NonNegativeInt = 0
    """Seed of the weights, the order of samples and the augmentation."""

    resume: str = "auto"
    """Start of the run. auto continues the run in run.dir if it is the same run, whatever its paths, workers, log lines
    and checkpoints; never fails if run.dir contains a run; the path of a checkpoint continues from there, with its step
    and optimizer, in a new run.dir."""

    checkpoint_every: PositiveInt = 2_000
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep, newest first."""

    trackers: list[str] | str | None = None
    """Services that get the metrics too, each with an extra of its name: one or a list of tensorboard, wandb, trackio,
    mlflow, and those that installed packages add. A resumed run continues its run there."""

    project: str = "fastres"
    """Project of Weights & Biases and trackio, and experiment of MLflow."""

    tensorboard: bool = False
    """Short for the tracker tensorboard."""

    wandb: bool = False
    """Short for the tracker wandb (Weights & Biases)."""

    timeout_s: PositiveFloat = 600.0
    """Seconds without a step after which a run of several processes ends with an error that names the process that
    hangs."""

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a whole run: the name of the recipe that it started from, and seven sections of fields.

        config = Config(data=DataConfig(source="digits"), train=TrainConfig(batch_size=128))

    All fields have defaults, those of the recipe cifar10-resnet20. Nothing is checked here: fastres.config.parse checks
    what a command line and files give.
    """

    recipe: str = DEFAULT_RECIPE
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)
    given_for: dict[str, Length] = field(default_factory=dict)
    """Length for which a value of the schedule was given, if the run has another: config.length.in_steps scales it."""


NO_SECTIONS = {"recipe", "given_for"}
SECTIONS = [field.name for field in dataclasses.fields(Config) if field.name not in NO_SECTIONS]
FIELDS = [  # `section.field` for every field
    f"{section}.{field.name}"
    for section in SECTIONS
    for field in dataclasses.fields(typing.get_type_hints(Config)[section])
]


def trackers_of(run: RunConfig) -> list[str]:
    """Return the names of a run's trackers, each once."""
    named = [run.trackers] if isinstance(run.trackers, str) else run.trackers or []
    return list(dict.fromkeys([name for name in ("tensorboard", "wandb") if getattr(run, name)] + named))


def model_options(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of build_model besides the name and the sizes that come from the data."""
    return model.options | ({} if model.shortcut is None else {"shortcut": model.shortcut})


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dicts and lists, without LOCAL_FIELDS; train.epochs replaces train.steps."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    del plain["given_for"]
    if config.train.epochs is not None:
        del plain["train"]["steps"]
    for section, names in LOCAL_FIELDS.items():
        for name in names:
            del plain[section][name]
    return plain


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML, which --config accepts to repeat the run."""
    return write_yaml(to_dict(config))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differences between two to_dict() as `section.field: old -> new`.

    The recipe's name and MAY_CHANGE are not compared, and model.weights is the same file in any spelling. A field that
    an earlier version did not write counts as having its present default.
    """
    lines, defaults = [], to_dict(Config())
    for section in SECTIONS:
        a, b = defaults[section] | old.get(section, {}), new.get(section, {})
        for name in sorted(set(a) | set(b)):
            key, before, after = f"{section}.{name}", a.get(name), b.get(name)
            if key not in MAY_CHANGE and before != after and not (key == "model.weights" and _same_file(before, after)):
                lines.append(f"{key}: {_as_typed(before)} -> {_as_typed(after)}")
    return lines


def _as_typed(value: Any) -> str:
    """Return a value as a flag takes it, such as null for None."""
    return value if isinstance(value, str) else json.dumps(value)


def _same_file(one: Any, other: Any) -> bool:
    """Return True if two values are spellings of one path."""
    return isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()
