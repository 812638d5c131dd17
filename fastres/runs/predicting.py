"""Load a run or an exported file for predictions: images of any size in, probabilities of named classes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from fastres.data.augment import normalize, resize_and_center_crop, tile_row
from fastres.data.description import DataDescription, from_dict
from fastres.models.registry import METADATA, build_model
from fastres.runs.exporting import METADATA_FILE, onnx_session, run_onnx
from fastres.runs.loading import load_description, load_run, rebuild
from fastres.training.engine import Engine, resolve_engine
from fastres.training.step import Forward
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import UsageError, first_line


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A network with what its inputs and outputs mean."""

    data: DataDescription  # of the run
    logits: Callable[[Tensor], Tensor]  # (b, C, S, S) float32 on the CPU -> (b, classes)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return an image, (H, W, 3) uint8 RGB of any size, as the run's evaluation sees it: (S, S, C) uint8.

        If the run does not resize its images, the shorter side becomes S, antialiased, and the centre is taken.
        """
        size = self.data.image_size
        if self.data.channels == 1:
            image = np.array(Image.fromarray(image).convert("L"))[..., None]
        if self.data.resize:
            return resize_and_center_crop(image, size)
        return image if image.shape[:2] == (size, size) else resize_and_center_crop(image, size, zoom=1.0)

    @torch.no_grad()
    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probabilities of the classes, (b, classes) float32, of b prepared images."""
        shift, scale = (tile_row(torch.tensor(of), self.data.image_size) for of in (self.data.mean, self.data.std))
        inputs = normalize(torch.from_numpy(np.stack(images)), shift, scale, torch.float32)
        outputs = self.logits(inputs)[:, : len(self.data.classes)]  # model.num_classes may be larger
        return np.asarray(outputs.float().softmax(1).cpu())


def load_predictor(path: Path, checkpoint: Path | None = None, flags: Sequence[str] = ()) -> Predictor:
    """Return the predictor of a run's folder, or of a file that fastres.export has written.

    Args:
        path: a run's folder, or a .safetensors, .pt2 or .onnx file.
        checkpoint: a checkpoint of the run, to take its weights; None takes the final ones.
        flags: flags of fastres.train, such as --engine.device=cpu, applied over the run's configuration.

    Raises:
        UsageError: if the path is neither, or does not say what its classes are.
    """
    if path.is_dir():
        return _of_run(path, checkpoint, flags)
    if checkpoint is not None:
        raise UsageError(f"--checkpoint {checkpoint}: belongs to the folder of a run, and {path} is a file")
    load = {".safetensors": _of_safetensors, ".pt2": _of_program, ".onnx": _of_onnx}.get(path.suffix.lower())
    if not path.exists() or load is None:
        raise UsageError(
            f"{path}: is neither the folder of a run nor an exported .safetensors, .pt2 or .onnx file; give one"
        )
    try:
        return load(path)
    except UsageError:
        raise
    except Exception as error:  # a damaged or foreign file may raise anything
        raise UsageError(f"{path}: cannot be read ({first_line(error)}); export it again") from None


def _of_run(folder: Path, checkpoint: Path | None, flags: Sequence[str]) -> Predictor:
    # Run eagerly, because few images do not earn back the time to compile.
    config, weights = load_run(folder, checkpoint, ["--engine.compile=false", "--engine.cuda_graph=false", *flags])
    data = load_description(folder)
    if data is None:
        raise UsageError(f"{folder}: has no data.json, because an earlier version has written it; train it again")
    engine = resolve_engine(config)
    engine.apply_torch_settings()
    model = engine.place(rebuild(config, weights, engine.norm)).eval()
    return Predictor(data=data, logits=_on(engine, Forward(model, engine, config.train.eval_mirrored)))


def _on(engine: Engine, forward: Forward) -> Callable[[Tensor], Tensor]:
    """Return the network's logits as a function of float32 images on the CPU."""
    return lambda images: forward.logits(images.to(engine.device, engine.dtype).to(memory_format=engine.memory_format))


def _of_safetensors(path: Path) -> Predictor:
    with safetensors.safe_open(path, "pt") as file:
        data, content = _described((file.metadata() or {}).get(METADATA), path)
    weights = safetensors.torch.load_file(path)
    model = build_model(
        content["model"],
        num_classes=weights["fc.weight"].shape[0],
        in_channels=data.channels,
        **{name: value for name, value in content["options"].items() if name != "fused_convolutions"},
    )
    model.load_state_dict(weights)
    return Predictor(data=data, logits=model.eval())


def _of_program(path: Path) -> Predictor:
    extra = {METADATA_FILE: ""}
    program = torch.export.load(path, extra_files=extra)
    data, _ = _described(extra[METADATA_FILE], path)
    return Predictor(data=data, logits=program.module())


def _of_onnx(path: Path) -> Predictor:
    try:
        session = onnx_session(path)
    except ImportError:
        raise UsageError(f"{path}: onnxruntime is not installed; pip install '.[export]'") from None
    data, _ = _described(session.get_modelmeta().custom_metadata_map.get(METADATA), path)
    return Predictor(data=data, logits=run_onnx(session))


def _described(text: str | None, path: Path) -> tuple[DataDescription, dict[str, Any]]:
    """Return the description of the data in a file's metadata, and all of the metadata."""
    content = parse_json(text or "{}")
    if "data" not in content:
        raise UsageError(f"{path}: does not say what its classes are; export the run again with this version")
    return from_dict(content["data"], path), content
