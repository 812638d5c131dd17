"""`fastres doctor`: check what this machine has for training, and print a remedy for each missing part.

Exit status 0 if the engine can train, even if optional parts are missing; 1 if something essential is broken.
"""

from __future__ import annotations

import importlib
import math
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from fastres import training
from fastres.config.schema import Config, EngineConfig, OptimConfig
from fastres.runs.environment import DALI, version
from fastres.utils.errors import Parser, UsageError, first_line, run_command, user_path

# Other packages, and torch, are imported by the check that needs them, so that a broken package is a finding and not
# the end.

OK, NOTE, WARNING, BROKEN = "ok", "note", "warning", "broken"
STYLES = {OK: "green", NOTE: "dim", WARNING: "yellow", BROKEN: "bold red"}
Findings = Iterator[tuple[str, str]]  # mark, text

EXTRAS = {  # purpose: (packages, the extra that installs them)
    "TensorBoard": (("tensorboard",), "tensorboard"),
    "Weights & Biases": (("wandb",), "wandb"),
    "trackio": (("trackio",), "trackio"),
    "MLflow": (("mlflow-skinny",), "mlflow"),
    "ONNX export": (("onnx", "onnxscript", "onnxruntime"), "export"),
}
LAYOUTS = {  # the folder of each data set under its root
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
    "imagefolder": "train",
}
LEAST_FREE_GB = 1.0  # for a CIFAR archive, unpacked, and checkpoints


def versions() -> Findings:
    """Report Python, torch, and every other package that fastres requires."""
    import torch

    yield OK, f"Python {platform.python_version()}, torch {torch.__version__}"
    try:
        required = [re.split(r"[^\w.-]", r)[0] for r in metadata.requires("fastres") or () if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        yield WARNING, "fastres is not installed: pip install -e . in the checkout"
        return
    found = {name: version(name) for name in required}
    missing = [name for name in required if found[name] is None]
    yield OK, ", ".join(f"{name} {found[name]}" for name in required if found[name] and name != "torch")
    if missing:
        yield BROKEN, f"not installed: pip install {' '.join(missing)}"


def torchvision() -> Findings:
    """Report whether torchvision can be imported, which fails if it was built for another torch."""
    import torch

    try:
        yield (OK, f"torchvision {importlib.import_module('torchvision').__version__} fits torch {torch.__version__}")
    except Exception as error:  # ImportError, OSError or RuntimeError, depending on what does not fit
        remedy = "pip install --force-reinstall torch torchvision"
        if torch.version.cuda is None:
            remedy += ", or install torchvision from the index that the CPU-only torch came from"
        yield BROKEN, f"torchvision does not fit torch {torch.__version__} ({first_line(error)}); {remedy}"


def gpu() -> Findings:
    """Report every GPU that torch sees."""
    import torch

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield OK, f"cuda:{index} {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {size}"
    if not torch.cuda.is_available():
        build = "is a build for CPUs only" if torch.version.cuda is None else f"is for CUDA {torch.version.cuda}"
        has_driver = shutil.which("nvidia-smi") is not None
        yield (
            WARNING if has_driver else NOTE,
            f"torch sees no GPU (torch {build})"
            + ("; nvidia-smi is installed, so compare the driver's CUDA version with torch's" if has_driver else ""),
        )


def engine() -> Findings:
    """Report the value that each `auto` resolves to."""
    for reason in training.resolve_engine(Config()).reasons:
        yield OK, reason


def compiler() -> Findings:
    """Report whether torch.compile has what it needs, on a GPU if there is one, and on a CPU."""
    import torch

    devices = {"cuda": "GPU", "cpu": "CPU"} if torch.cuda.is_available() else {"cpu": "CPU"}
    for name, device in devices.items():
        found, why = training.can_compile(torch.device(name))
        yield (
            OK if found else WARNING,
            why + ("" if found else f" (until then a {device} trains without torch.compile)"),
        )


def training_step() -> Findings:
    """Run one real step of ResNet-20 in each precision, not compiled."""
    import torch

    from fastres.utils.precision import DTYPES

    for precision in DTYPES if torch.cuda.is_available() else ("fp32", "bf16"):
        settings: dict[str, Any] = {"precision": precision, "compile": False}
        try:
            engine = training.resolve_engine(Config(engine=EngineConfig(**settings)))
            engine.apply_torch_settings()
            loss = loss_of_step(engine)
        except UsageError as error:
            yield NOTE, str(error)
        except Exception as error:
            yield BROKEN, f"{precision}: {type(error).__name__}: {first_line(error)}"
        else:
            yield (OK if math.isfinite(loss) else BROKEN, f"{precision}: a step of resnet20 has loss {loss:.4f}")


def loss_of_step(engine: training.Engine) -> float:
    """Return the loss of a step on two random images, after forward, backward and update."""
    import torch

    from fastres.models.registry import build_model

    torch.manual_seed(0)
    model = engine.place(build_model("resnet20"))
    step = training.TrainStep(model, engine, OptimConfig())
    images = torch.randn(2, 3, 32, 32, device=engine.device, dtype=engine.dtype)
    images = images.to(memory_format=engine.memory_format)
    step(images, torch.tensor([0, 1], device=engine.device), lr=0.1, step=0)
    return step.metrics.read()[0].mean_loss


def optional() -> Findings:
    """Report Triton, DALI, apex and the extras."""
    triton = version("triton")
    yield ((OK, f"Triton {triton}") if triton else (NOTE, "Triton is not installed: on a GPU, pip install triton"))
    dali = next((f"DALI {version(name)} ({name})" for name in DALI if version(name)), None)
    yield (OK, dali) if dali else (NOTE, "DALI is not installed: pip install 'fastres[dali]'")
    apex, why = training.find_apex("optimizers")
    yield (NOTE if apex is None else OK), why
    for purpose, (packages, extra) in EXTRAS.items():
        if missing := [name for name in packages if version(name) is None]:
            yield NOTE, f"{purpose}: {', '.join(missing)} not installed: pip install 'fastres[{extra}]'"
        else:
            yield OK, f"{purpose}: {', '.join(f'{name} {version(name)}' for name in packages)}"


def disk() -> Findings:
    """Report whether the current directory is writable and has room for runs."""
    here = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=here):
            yield OK, f"{here} is writable"
    except OSError as error:
        yield (WARNING, f"{here} is not writable ({error.strerror}); change it, or give --run.dir and --data.root")
    free_gb = shutil.disk_usage(here).free / 1e9
    enough = free_gb >= LEAST_FREE_GB
    yield (OK if enough else WARNING, f"{free_gb:,.1f} GB free" + ("" if enough else ": make room for data and runs"))


def data(root: Path) -> Findings:
    """Report which data sets are under `root`; nothing is read or downloaded."""
    found = [name for name, folder in LAYOUTS.items() if (root / folder).is_dir()]
    yield (
        (OK if found else NOTE),
        f"under {root}: {', '.join(found) or 'nothing'}; digits and synthetic need no files",
    )


def parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser("doctor", description=__doc__.partition(": ")[2])
    parser.add_argument("--data.root", dest="root", type=user_path, default=Path("data"), metavar="FOLDER",
                        help="Folder to search for data sets. (default: %(default)s)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run all checks and print their findings. Return the exit status."""
    root: Path = parser().parse_args(argv).root
    checks: dict[str, Callable[[], Findings]] = {
        "versions": versions,
        "torchvision": torchvision,
        "GPU": gpu,
        "auto": engine,
        "compiler": compiler,
        "training": training_step,
        "optional": optional,
        "disk": disk,
        "data": lambda: data(root),
    }
    console, marks = Console(soft_wrap=True), []
    for name, check in checks.items():
        for mark, text in survived(check):
            console.print(f"[{STYLES[mark]}]{mark:<8}[/] {name:<12}", end="")
            console.print(text, markup=False, highlight=False)
            marks.append(mark)
    broken, warnings = marks.count(BROKEN), marks.count(WARNING)
    print(f"fastres {'cannot train here' if broken else 'can train here'}: {broken} broken, {warnings} warning(s)")
    return 1 if broken else 0


def survived(check: Callable[[], Findings]) -> Findings:
    """Yield the check's findings, and an exception that it raises as one more finding."""
    try:
        yield from check()
    except Exception as error:
        yield BROKEN, f"{type(error).__name__}: {first_line(error)}"


if __name__ == "__main__":
    run_command(main)
