"""Name the flag that was meant by an argument that fastres.train does not have."""

from __future__ import annotations

from pathlib import Path

from fastres.config.files import recipe_names
from fastres.config.schema import FIELDS
from fastres.models.registry import find, is_foreign
from fastres.utils.suggest import near_flags, nearest

# Names of other programs, most of them timm's or torchvision's, and the field or the setting here. A name that is a
# field without its section, such as --lr, is not listed: near_flags() finds it.
NAMES_ELSEWHERE = {
    "a": "model.name",
    "accum_iter": "train.accumulate",
    "amp": "engine.precision bf16",
    "arch": "model.name",
    "b": "train.batch_size",
    "bf16": "engine.precision bf16",
    "checkpoint": "run.resume",
    "checkpoint_hist": "run.keep_checkpoints",
    "cpu": "engine.device cpu",
    "cuda": "engine.device cuda",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset": "data.source",
    "dataset_download": "data.download",
    "decay_milestones": "schedule.milestones",
    "decay_rate": "schedule.factor",
    "dtype": "engine.precision",
    "experiment": "run.dir",
    "fp16": "engine.precision fp16",
    "gpu": "engine.device cuda",
    "grad_accum_steps": "train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "hflip": "data.flip",
    "img_size": "data.image_size",
    "initial_checkpoint": "model.weights",
    "input_size": "data.image_size",
    "iterations": "train.steps",
    "j": "data.workers",
    "learning_rate": "optim.lr",
    "log_interval": "train.log_every",
    "log_wandb": "run.trackers wandb",
    "lr_gamma": "schedule.factor",
    "lr_scheduler": "schedule.name",
    "lr_steps": "schedule.milestones",
    "lr_warmup_epochs": "schedule.warmup_steps",
    "max_steps": "train.steps",
    "min_lr": "schedule.final_scale",
    "num_workers": "data.workers",
    "opt": "optim.name",
    "optimizer": "optim.name",
    "out": "run.dir",
    "outdir": "run.dir",
    "output": "run.dir",
    "output_dir": "run.dir",
    "pretrained": "model.weights DEFAULT",
    "print_freq": "train.log_every",
    "recovery_interval": "run.checkpoint_every",
    "report_to": "run.trackers",
    "save_every": "run.checkpoint_every",
    "sched": "schedule.name",
    "scheduler": "schedule.name",
    "smoothing": "train.label_smoothing",
    "sync_bn": "model.sync_norm",
    "torchcompile": "engine.compile",
    "tta": "train.eval_mirrored",
    "val_batch_size": "train.eval_batch_size",
    "validation_batch_size": "train.eval_batch_size",
    "val_interval": "train.eval_every",
    "val_split": "data.validation",
    "warmup_epochs": "schedule.warmup_steps",
    "warmup_lr": "schedule.warmup_scale",
    "wd": "optim.weight_decay",
}


def flags_meant_by(name: str) -> list[str]:
    """Return the flags, with a value where it matters, that the name of an unknown flag may mean.

    Args:
        name: the flag with or without its dashes, such as --lr, --weight-decay or --no-flip.
    """
    plain = name.lstrip("-").lower().replace("-", "_")
    if setting := NAMES_ELSEWHERE.get(plain):
        return [f"--{setting}"]
    flags = [f"--{field}" for field in FIELDS]
    if plain.startswith("no_") and (negated := near_flags(plain[3:], flags)):
        return [f"{flag} false" for flag in negated]
    return near_flags(plain, flags)


def flag_meant_by_argument(word: str) -> str | None:
    """Return the flag with its value that was meant by an argument without a flag, or None if nothing is similar."""
    path, name = Path(word).expanduser(), word.partition("=")[0]
    if word in recipe_names():
        return f"--recipe {word}"
    if name in FIELDS:
        return f"--{word}"
    if (path / "config.yaml").is_file():
        return f"--config {Path(word, 'config.yaml')}"
    if path.is_dir():
        return f"--data.root {word}"
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        return f"--config {word}"
    if path.suffix == ".pt" and path.parent.name == "checkpoints":
        return f"--run.resume {word}"
    if path.suffix in (".safetensors", ".pth", ".pt"):
        return f"--model.weights {word}"
    if is_model(word):
        return f"--model.name {word}"
    near = nearest(word, recipe_names())
    return f"--recipe {near}" if near else None


def is_model(name: str) -> bool:
    """Return True if `name` is a network's name, as far as it is known without importing another package."""
    try:
        return is_foreign(name) or find(name) is not None
    except ValueError:
        return False
