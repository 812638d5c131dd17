"""Load a run or an exported file for predictions: images of any size in, probabilities of named classes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from fastres.data.augment import normalize, resize_and_center_crop, tile_row
from fastres.data.description import DataDescription, from_dict
from fastres.data.sources.formats import decode
from fastres.models.registry import METADATA, build_model
from fastres.runs.exporting import METADATA_FILE, onnx_session, run_onnx
from fastres.runs.loading import load_description, read_run, rebuild
from fastres.training.engine import Engine, resolve_engine
from fastres.training.evaluator import for_inference
from fastres.training.step import Forward
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import UsageError, first_line


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A network with what its inputs and outputs mean.

    Attributes:
        data: the description of the run's data.
        logits: the network as a function: images (b, C, S, S) float32 on the CPU -> logits (b, outputs).
        model: the network in eval mode, on the engine's device; None for a file of torch.export or ONNX. If load_run
            has folded it, `logits` computes with a copy, which later changes of `model` do not reach.
    """

    data: DataDescription
    logits: Callable[[Tensor], Tensor]
    model: nn.Module | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the network's outputs."""
        return self.data.classes

    def predict(self, images: Iterable[Any], top: int = 1, batch_size: int = 64) -> list[list[tuple[str, float]]]:
        """Return the `top` most probable classes of each image with their probabilities, the most probable first.

        Args:
            images: paths of files, or arrays (H, W, 3), (H, W, 1) or (H, W) uint8; of any sizes.
            top: classes for each image.
            batch_size: images at once.

        Returns:
            For each image, `top` pairs of a class and its probability, in [0, 1].

        Raises:
            UsageError: if a file cannot be read or an array is no image.
        """
        prepared = [self.prepare(self._pixels(image)) for image in images]
        batches = (prepared[start : start + batch_size] for start in range(0, len(prepared), batch_size))
        return [row for batch in batches for row in self.best(batch, top)]

    def best(self, images: Sequence[np.ndarray], top: int) -> list[list[tuple[str, float]]]:
        """Return the `top` most probable classes of each of b images of prepare(), as predict() does."""
        return [
            [(self.classes[index], float(row[index])) for index in (-row).argsort(kind="stable")[:top]]
            for row in self.probabilities(images)
        ]

    def preprocess(self, image: Any) -> Tensor:
        """Return one image, as predict() takes them, as the network's input: (C, S, S) float32, normalised."""
        return self._normalised([self.prepare(self._pixels(image))])[0]

    def _pixels(self, image: Any) -> np.ndarray:
        """Return an image as (H, W, 3) uint8 RGB."""
        if isinstance(image, str | Path):
            return decode(Path(image), exif=self.data.exif)
        pixels = np.asarray(image)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
            raise UsageError(
                f"an image is {pixels.dtype} of shape {pixels.shape}; give a path, or uint8 of (H, W, 3) or (H, W)"
            )
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels

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
        """Return the probabilities of the classes, (b, classes) float32, of b images of prepare(), (S, S, C) uint8."""
        outputs = self.logits(self._normalised(images))[:, : len(self.data.classes)]  # model.num_classes may be larger
        return np.asarray(outputs.float().softmax(1).cpu())

    def _normalised(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return b prepared images as (b, C, S, S) float32."""
        shift, scale = (tile_row(torch.tensor(of), self.data.image_size) for of in (self.data.mean, self.data.std))
        return normalize(torch.from_numpy(np.stack(images)), shift, scale, torch.float32)


def load_run(
    path: str | Path,
    checkpoint: str | Path | None = None,
    flags: Sequence[str] = (),
    model: nn.Module | None = None,
    trust_code: bool = False,
    fold: bool = True,
) -> Predictor:
    """Return the predictor of a run's folder, or of a file that fastres.export has written.

    Args:
        path: a run's folder, or a .safetensors, .pt2 or .onnx file.
        checkpoint: a checkpoint of the run, to take its weights; None takes the final ones.
        flags: flags of fastres.train, such as --engine.device=cpu, applied over the run's configuration.
        model: the run's network, if it was given to fastres.fit as an object. It gets the run's weights.
        trust_code: allow a network package.module:function to be imported.
        fold: predict with a copy of a run's network whose BatchNorms are folded into the convolutions, on a CPU. It is
            faster, takes 0.1 to 0.5 s to make, and its probabilities differ from the network's in rounding.

    Raises:
        UsageError: if the path is neither, or does not say what its classes are.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        flags = [*flags, *(["--model.trust_code=true"] if trust_code else [])]
        return _of_run(path, None if checkpoint is None else Path(checkpoint), flags, model, fold)
    if checkpoint is not None:
        raise UsageError(f"--checkpoint {checkpoint}: belongs to the folder of a run, and {path} is a file")
    if model is not None:
        raise UsageError(f"{path}: is a file, which has its own network; leave out `model`")
    loaders: dict[str, Callable[[Path], Predictor]] = {
        ".safetensors": partial(_of_safetensors, trust_code=trust_code),
        ".pt2": _of_program,
        ".onnx": _of_onnx,
    }
    load = loaders.get(path.suffix.lower())
    if not path.exists():
        raise UsageError(f"{path}: does not exist; give the folder of a run, or an exported file")
    if load is None:
        raise UsageError(
            f"{path}: is neither the folder of a run nor an exported .safetensors, .pt2 or .onnx file; give one"
        )
    try:
        return load(path)
    except UsageError:
        raise
    except Exception as error:  # a damaged or foreign file may raise anything
        raise UsageError(f"{path}: cannot be read ({first_line(error)}); export it again") from None


def _of_run(
    folder: Path, checkpoint: Path | None, flags: Sequence[str], model: nn.Module | None, fold: bool
) -> Predictor:
    # Run eagerly, because few images do not earn back the time to compile.
    flags = ["--engine.compile=false", "--engine.cuda_graph=false", *flags]
    config, weights = read_run(folder, checkpoint, flags, given=model is not None)
    data = load_description(folder)
    if data is None:
        raise UsageError(f"{folder}: has no data.json, because an earlier version has written it; train it again")
    engine = resolve_engine(config)
    engine.apply_torch_settings()
    model = engine.place(rebuild(config, weights, data, engine.norm, model)).eval()
    forward = Forward(for_inference(model, engine) if fold else model, engine, config.train.eval_mirrored)
    return Predictor(data=data, logits=_on(engine, forward), model=model)


def _on(engine: Engine, forward: Forward) -> Callable[[Tensor], Tensor]:
    """Return the network's logits as a function of float32 images on the CPU."""
    return lambda images: forward.logits(images.to(engine.device, engine.dtype).to(memory_format=engine.memory_format))


def _of_safetensors(path: Path, *, trust_code: bool) -> Predictor:
    with safetensors.safe_open(path, "pt") as file:
        data, content = _described((file.metadata() or {}).get(METADATA), path)
    weights = safetensors.torch.load_file(path)
    options = {name: value for name, value in content["options"].items() if name != "fused_convolutions"}
    sizes = {"num_classes": content["num_classes"], "in_channels": data.channels}
    try:
        model = build_model(content["model"], trust_code=trust_code, **sizes, **options)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    model.load_state_dict(weights)
    return Predictor(data=data, logits=model.eval(), model=model)


def _of_program(path: Path) -> Predictor:
    extra = {METADATA_FILE: ""}
    program = torch.export.load(path, extra_files=extra)
    data, _ = _described(extra[METADATA_FILE], path)
    return Predictor(data=data, logits=program.module())


def _of_onnx(path: Path) -> Predictor:
    try:
        session = onnx_session(path)
    except ImportError:
        raise UsageError(f"{path}: onnxruntime is not installed; pip install 'fastres[export]'") from None
    data, _ = _described(session.get_modelmeta().custom_metadata_map.get(METADATA), path)
    return Predictor(data=data, logits=run_onnx(session))


def _described(text: str | None, path: Path) -> tuple[DataDescription, dict[str, Any]]:
    """Return the description of the data in a file's metadata, and all of the metadata."""
    content = parse_json(text or "{}")
    if "data" not in content:
        raise UsageError(f"{path}: does not say what its classes are; export the run again with this version")
    return from_dict(content["data"], path), content
