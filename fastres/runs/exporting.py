"""Export a run's network in one of FORMATS, and verify the file by reloading it.

The network is exported in fp32 and for inference. It takes normalised images (N, C, S, S), for any N, and returns
logits (N, classes).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.config.schema import Config, model_options
from fastres.models.registry import METADATA, check_input_shape, is_foreign
from fastres.utils.atomic_io import parse_json, write_json
from fastres.utils.errors import RunError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastres.data.description import DataDescription

    Network = Callable[[Tensor], Tensor]  # (N, C, S, S) float32 -> (N, classes) float32

# The functions import torch, because the command line needs FORMATS before it.

METADATA_FILE = "fastres.json"  # the metadata of a torch.export program
TOLERANCE = 1e-4  # largest difference of two logits, as a fraction of the largest logit
BATCHES = (2, 5, 1)  # batch sizes that are compared; the first is traced, and exporters tend to special-case 1
SIDES = {"digits": 8, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32, "synthetic": 32}


def metadata(config: Config, data: DataDescription | None) -> dict[str, Any]:
    """Return what a reader of a run's weights has to know: the network and its data, without paths or times."""
    described = {} if data is None else {"data": data.to_dict(), "num_classes": data.outputs(config.model.num_classes)}
    return {"model": config.model.name, "options": model_options(config.model), **described}


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to write a network to a file and to read it back."""

    suffix: str
    write: Callable[[nn.Module, Tensor, Path, str], None]  # (network, example images, file, metadata as JSON)
    reload: Callable[[Path, Config, DataDescription | None], Network]
    fixes_side: bool = True  # the exported network takes images of one side only
    needs: tuple[str, ...] = ()  # packages of the extra `export`


def write_program(model: nn.Module, images: Tensor, path: Path, metadata: str) -> None:
    """Write the network as a torch.export program, with the metadata as extra file METADATA_FILE."""
    import torch

    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    # torch would raise an error of its own type for a file that it cannot write, so write it here.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA_FILE: metadata})
    path.write_bytes(content.getbuffer())


def write_onnx(model: nn.Module, images: Tensor, path: Path, metadata: str) -> None:
    """Write the network as ONNX, with the metadata under the key METADATA."""
    import torch

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None  # it is None only without dynamo
    program.model.metadata_props[METADATA] = metadata
    program.save(path, external_data=False)


def reload_onnx(path: Path, *_: Any) -> Network:
    """Return the network of an ONNX file, run by onnxruntime on the CPU."""
    return run_onnx(onnx_session(path))


def onnx_session(path: Path) -> Any:
    """Return onnxruntime's session of an ONNX file, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(session: Any) -> Network:
    """Return the network of a session."""
    import torch

    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def reload_program(path: Path, *_: Any) -> Network:
    """Return the network of a torch.export program."""
    import torch

    return torch.export.load(path).module()


def write_safetensors(model: nn.Module, _: Tensor, path: Path, metadata: str) -> None:
    """Write the weights under torchvision's keys, with the metadata under the key METADATA."""
    from fastres.models.weights import save_weights

    save_weights(model, path, json.loads(metadata))


def reload_safetensors(path: Path, config: Config, data: DataDescription | None) -> Network:
    """Return the run's network with the weights of the file."""
    import safetensors.torch

    from fastres.runs.loading import rebuild

    return rebuild(config, safetensors.torch.load_file(path), data).eval()


FORMATS: dict[str, Format] = {
    "safetensors": Format(suffix=".safetensors", write=write_safetensors, reload=reload_safetensors, fixes_side=False),
    "torch_export": Format(suffix=".pt2", write=write_program, reload=reload_program),
    "onnx": Format(suffix=".onnx", write=write_onnx, reload=reload_onnx, needs=("onnx", "onnxscript", "onnxruntime")),
}


def export(
    config: Config, weights: dict[str, Tensor], name: str, output: Path, data: DataDescription | None = None
) -> tuple[float, tuple[int, ...]]:
    """Write the network to `output`, which appears only after its logits agree with the original's.

    Args:
        config: the run's configuration.
        weights: the run's state_dict.
        name: a format of FORMATS.
        output: the file. A config.json in timm's style is written beside it if the data is known.
        data: the run's data, which the file describes too.

    Returns:
        The largest difference of two logits, and the shape (C, S, S) of one image.

    Raises:
        RunError: if the logits differ by more than TOLERANCE.
        UsageError: if the file cannot be written or the images' side is not known.
    """
    import torch

    from fastres.runs.loading import outputs_and_channels, rebuild

    format_, model = FORMATS[name], rebuild(config, weights, data).eval()
    _, channels = outputs_and_channels(config, weights, data)
    shape = (channels, *[data.image_size if data else side_of(config, format_)] * 2)
    card = output.with_name("config.json")
    if data is not None and card.exists() and not _is_card(card):
        raise UsageError(f"--output {output}: {card} exists and is not from an export; choose another folder")
    if not is_foreign(config.model.name):
        check_input_shape(config.model.name, (1, *shape), training=False, **model_options(config.model))
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, *shape, generator=random) for n in BATCHES]
    temporary = output.with_name(f".{os.getpid()}.{output.name}")  # with the same suffix
    try:
        format_.write(model, batches[0], temporary, json.dumps(metadata(config, data), sort_keys=True))
        again = format_.reload(temporary, config, data)
        with torch.no_grad():
            wanted = torch.cat([model(images) for images in batches])
            difference = (torch.cat([again(images) for images in batches]) - wanted).abs().max().item()
        largest = wanted.abs().max().item()
        if not difference <= TOLERANCE * largest:  # also true if it is NaN
            raise RunError(
                f"--format {name}: the reloaded network's logits differ by {difference:.2g}, of up to {largest:.2g} "
                f"({output} is not written); try another --format"
            )
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(output)
        if data is not None:
            write_json(card, timm_card(config, data))
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written ({error.strerror or error}); choose another") from None
    finally:
        temporary.unlink(missing_ok=True)
    return difference, shape


def timm_card(config: Config, data: DataDescription) -> dict[str, Any]:
    """Return the content of a config.json as timm writes it for a network, with fastres's own under METADATA."""
    return {
        "architecture": config.model.name,
        "num_classes": data.outputs(config.model.num_classes),
        "label_names": list(data.classes),
        "pretrained_cfg": {
            "input_size": [data.channels, data.image_size, data.image_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 224 / 256 if data.resize else 1.0,
            "crop_mode": "center",
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": data.outputs(config.model.num_classes),
            "classifier": "fc",
            "first_conv": "conv1",
        },
        METADATA: metadata(config, data),
    }


def _is_card(path: Path) -> bool:
    """Return True if the file is a config.json that an export has written."""
    try:
        return METADATA in parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def side_of(config: Config, format_: Format) -> int:
    """Return the side in pixels of the images that the run's network sees, without reading the data.

    Raises:
        UsageError: if the configuration does not determine the side and the format needs it.
    """
    side = config.data.image_size or SIDES.get(config.data.source)
    if side is None and format_.fixes_side:
        raise UsageError(
            f"data.image_size: the run does not record the size of its {config.data.source} images; give "
            "--data.image_size"
        )
    return side or 32
