"""Translate the tutorial's flat config.json into sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastres.utils.errors import UsageError

TUTORIAL_KEYS = ("height", "width", "label", "num_layer", "model_mode", "zero_padding")


def translate_tutorial(flat: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the tutorial's config.json (height, width, label, num_layer, model_mode, zero_padding) as sections."""
    if unknown := sorted(set(flat) - set(TUTORIAL_KEYS), key=str):
        raise UsageError(f"{path}: unknown key {unknown[0]!r}; the tutorial's keys are {', '.join(TUTORIAL_KEYS)}")
    mode, n = flat.get("model_mode", "resnet"), flat.get("num_layer", 3)
    if mode not in ("resnet", "cnn"):
        raise UsageError(f"{path}: model_mode is {mode!r}; it must be resnet or cnn")
    for key in ("num_layer", "height", "width", "label"):
        if key in flat and (type(flat[key]) is not int or flat[key] < 1):
            raise UsageError(f"{path}: {key} is {flat[key]!r}; it must be a whole number above 0")
    if type(flat.get("zero_padding", True)) is not bool:
        raise UsageError(f"{path}: zero_padding is {flat['zero_padding']!r}; it must be true or false")
    if flat.get("height") != flat.get("width"):
        raise UsageError(f"{path}: height {flat.get('height')} and width {flat.get('width')} must be equal")
    # Not resnetN: 50 and 152 are ImageNet's.
    model: dict[str, Any] = {"name": "cifar_resnet", "options": {"blocks_per_stage": n}}
    if mode == "cnn":
        model["options"]["plain"] = True
    else:
        model["shortcut"] = "maxpool_pad" if flat.get("zero_padding", True) else "conv1x1"
    if "label" in flat:
        model["num_classes"] = flat["label"]
    return {"model": model} | ({"data": {"image_size": flat["height"]}} if "height" in flat else {})
