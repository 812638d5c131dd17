"""Export a run's network in one of FORMATS, and verify the file by reloading it.

The network is exported in fp32 and for inference. It takes normalised images (N, C, S, S), for any N, and returns
logits (N, classes).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastres.config.schema import Config, model_options
from fastres.models.registry import check_input_shape
from fastres.utils.errors import RunError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    Network = Callable[[Tensor], Tensor]  # (N, C, S, S) float32 -> (N, classes) float32

# The functions import torch, because the command line needs FORMATS before it.

TOLERANCE = 1e-4  # largest difference of two logits, as a fraction of the largest logit
BATCHES = (2, 5, 1)  # batch sizes that are compared; the first is traced, and exporters tend to special-case 1
SIDES = {"digits": 8, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32, "synthetic": 32}


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to write a network to a file and to read it back."""

    suffix: str
    write: Callable[[nn.Module, Tensor, Path], None]  # (network, example images, file)
    reload: Callable[[Path, Config], Network]
    fixes_side: bool = True  # the exported network takes images of one side only
    needs: tuple[str, ...] = ()  # packages of the extra `export`


def write_program(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write the network as a torch.export program."""
    import torch

    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    # torch would raise an error of its own type for a file that it cannot write, so write it here.
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write the network as ONNX."""
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
    program.save(path, external_data=False)


def reload_onnx(path: Path, _: Config) -> Network:
    """Return the network of an ONNX file, run by onnxruntime on the CPU."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def reload_program(path: Path, _: Config) -> Network:
    """Return the network of a torch.export program."""
    import torch

    return torch.export.load(path).module()


def write_safetensors(model: nn.Module, _: Tensor, path: Path) -> None:
    """Write the weights under torchvision's keys."""
    from fastres.models.weights import save_weights

    save_weights(model, path)


def reload_safetensors(path: Path, config: Config) -> Network:
    """Return the run's network with the weights of the file."""
    import safetensors.torch

    from fastres.runs.loading import rebuild

    return rebuild(config, safetensors.torch.load_file(path)).eval()


FORMATS: dict[str, Format] = {
    "safetensors": Format(suffix=".safetensors", write=write_safetensors, reload=reload_safetensors, fixes_side=False),
    "torch_export": Format(suffix=".pt2", write=write_program, reload=reload_program),
    "onnx": Format(suffix=".onnx", write=write_onnx, reload=reload_onnx, needs=("onnx", "onnxscript", "onnxruntime")),
}


def export(config: Config, weights: dict[str, Tensor], name: str, output: Path) -> tuple[float, tuple[int, ...]]:
    """Write the network to `output`, which appears only after its logits agree with the original's.

    Args:
        config: the run's configuration.
        weights: the run's state_dict.
        name: a format of FORMATS.
        output: the file.

    Returns:
        The largest difference of two logits, and the shape (C, S, S) of one image.

    Raises:
        RunError: if the logits differ by more than TOLERANCE.
        UsageError: if the file cannot be written or the images' side is not known.
    """
    import torch

    from fastres.runs.loading import rebuild

    format_, model = FORMATS[name], rebuild(config, weights).eval()
    shape = (weights["conv1.weight"].shape[1], *[side_of(config, format_)] * 2)
    check_input_shape(config.model.name, (1, *shape), training=False, **model_options(config.model))
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, *shape, generator=random) for n in BATCHES]
    temporary = output.with_name(f".{os.getpid()}.{output.name}")  # with the same suffix
    try:
        format_.write(model, batches[0], temporary)
        again = format_.reload(temporary, config)
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
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written ({error.strerror or error}); choose another") from None
    finally:
        temporary.unlink(missing_ok=True)
    return difference, shape


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
