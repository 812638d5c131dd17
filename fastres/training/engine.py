"""The engine: every `auto` of the configuration resolved for this machine, with the reason."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastres.config.schema import Config
from fastres.utils import ranks
from fastres.utils.errors import UsageError
from fastres.utils.precision import DTYPES, is_faster_in_bf16
from fastres_kernels import Conv2d
from fastres_kernels.batchnorm import dispatch_table
from fastres_kernels.cpu import batchnorm as cpp_norm
from fastres_kernels.cpu import convolution as cpp_conv
from fastres_kernels.cpu import dispatch_table as cpu_table
from fastres_kernels.cpu.library import instruction_set
from fastres_kernels.triton_launch import HAS_TRITON, INTERPRETED

APEX_NORM = "contrib.groupbn.batch_norm"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The resolved settings of the step on this device.

    Attributes:
        device: device of the network and the batches.
        precision: fp32, tf32, bf16, fp16 or fp64.
        channels_last: activations and weights are in channels-last order.
        compile: forward and loss run under torch.compile.
        compile_may_fall_back: `auto` chose `compile`, so a broken compiler means eager execution and no error.
        norm: norm of build_model: torch, fused, measured or apex.
        conv: algorithm of 3×3 convolutions, torch or cpp.
        compress_gradients: gradients are all-reduced in bf16.
        cuda_graph: whole steps are captured and replayed.
        cuda_graph_may_fall_back: `auto` chose `cuda_graph`, so a step that cannot be captured runs without it.
        deterministic: runs on the same device are bitwise identical.
        reasons: a line for each choice that `auto` made.
    """

    device: torch.device
    precision: str
    channels_last: bool
    compile: bool
    compile_may_fall_back: bool
    norm: str
    conv: str
    compress_gradients: bool
    cuda_graph: bool = False
    cuda_graph_may_fall_back: bool = False
    deterministic: bool = False
    reasons: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations and batches."""
        return DTYPES[self.precision]

    @property
    def memory_format(self) -> torch.memory_format:
        """Return the memory format of activations, weights and batches."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def apply_torch_settings(self) -> None:
        """Set torch's process-wide switches to this engine's: the current GPU, TF32, cuDNN's search, determinism."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.benchmark = not self.deterministic
        if self.deterministic:
            # torch reads it once, at a process's first matrix product, so bench/conftest.py sets it for all benchmarks.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:  # setting it imports torch's compiler
            torch.use_deterministic_algorithms(self.deterministic)
        # Filling memory that is about to be written only helps to find reads before writes; equal runs do not need it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def place(self, model: nn.Module) -> nn.Module:
        """Move the model to the device, in the engine's memory format, and choose its convolutions' algorithm.

        Weights become fp32, or fp64 if activations are fp64.

        Args:
            model: modified in place.

        Returns:
            The model.
        """
        for module in model.modules():
            if isinstance(module, Conv2d):
                module.algorithm = self.conv
        weights_dtype = torch.promote_types(self.dtype, torch.float32)
        return model.to(self.device, weights_dtype).to(memory_format=self.memory_format)


@contextmanager
def preserved_torch_settings() -> Iterator[None]:
    """Restore, after the block, the process-wide switches that Engine.apply_torch_settings() changes."""
    precision = torch.get_float32_matmul_precision()
    tf32, benchmark = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def as_setting(resolved: Any) -> str:
    """Return a resolved value as its field takes it: true for True, and auto for the norm that is chosen per shape."""
    return "auto" if resolved == "measured" else str(resolved).lower()


class _Choices:
    """The choices that `auto` makes, with a line for each: `field: value (reason)`, with a value that can be typed."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def choose(self, field: str, value: Any, choice: Any, reason: str) -> Any:
        """Return `value`, or `choice` if the value is auto, and keep the reason."""
        if value != "auto":
            return value
        self.reasons.append(f"{field}: {as_setting(choice)} ({reason})")
        return choice


def resolve_engine(config: Config, local_rank: int = 0) -> Engine:
    """Return the engine for this configuration on this machine. Nothing in the process changes.

    Args:
        config: the run's configuration.
        local_rank: this process's rank on its host, which is also the number of its GPU.

    Raises:
        UsageError: if a requested value is unavailable here.
    """
    wanted, choices = config.engine, _Choices()
    device = _resolve_device(wanted.device, local_rank, choices)
    precision = _resolve_precision(wanted.precision, device, choices)

    compiles, why = can_compile(device)
    if compiles and device.type == "cpu":
        compile_ = choices.choose(
            "compile", wanted.compile, False, "eager was measured faster on a CPU: docs/EXPERIMENTS.md"
        )
    else:
        compile_ = choices.choose("compile", wanted.compile, compiles, why)
    if compile_ and not compiles:
        raise UsageError(f"engine.compile true: {why}")
    graphs, why, remedy = cuda_graph_support(config, device)
    cuda_graph = choices.choose("cuda_graph", wanted.cuda_graph, graphs, why)
    if cuda_graph and not graphs:
        raise UsageError(f"engine.cuda_graph true: {why}; {remedy}")
    in_cpp, why = _norm_in_cpp(device, precision, bool(compile_), wanted.channels_last)
    norm = choices.choose("norm", config.model.norm, *_faster_norm(config, device, precision, in_cpp, why))
    in_cpp, why = _conv_in_cpp(device, precision, bool(compile_), wanted.channels_last)
    conv = choices.choose("conv", wanted.conv, "cpp" if in_cpp else "torch", why)
    if conv == "cpp" and not in_cpp:
        raise UsageError(f"engine.conv cpp: {why}; use torch")
    _check_norm(norm, config, device, precision)
    if norm == "fused" and device.type == "cpu" and not (INTERPRETED or config.model.options.get("fused_convolutions")):
        norm = "measured"  # so that an explicit `fused` is never slower than torch's operations on a CPU
    return Engine(
        device=device,
        precision=precision,
        channels_last=wanted.channels_last,
        compile=bool(compile_),
        compile_may_fall_back=wanted.compile == "auto",
        norm=norm,
        conv=conv,
        compress_gradients=wanted.compress_gradients,
        cuda_graph=bool(cuda_graph),
        cuda_graph_may_fall_back=wanted.cuda_graph == "auto",
        deterministic=wanted.deterministic,
        reasons=tuple(choices.reasons),
    )


def _resolve_device(wanted: str, local_rank: int, choices: _Choices) -> torch.device:
    """Return the device, a GPU with its number. Raise UsageError if it is unavailable."""
    on_gpu = torch.cuda.is_available()
    why = "torch sees a GPU" if on_gpu else "torch sees no GPU"
    device = torch.device(choices.choose("device", wanted, "cuda" if on_gpu else "cpu", why))
    if device.type != "cuda":
        return device
    named = ":" in str(device)
    if named and (processes := ranks.local_world_size()) > 1:
        raise UsageError(
            f"engine.device {device}: {processes} processes would share it; use cuda, which gives each its own"
        )
    if not on_gpu:
        raise UsageError(f"engine.device {device}: torch sees no GPU here; use --engine.device cpu")
    device = device if named else torch.device("cuda", local_rank)
    if device.index >= (count := torch.cuda.device_count()):
        remedy = "use another number" if named else f"use --nproc_per_node {count}"
        raise UsageError(f"engine.device {device}: this machine has {count} GPU{'s' * (count > 1)}; {remedy}")
    return device


def _resolve_precision(wanted: str, device: torch.device, choices: _Choices) -> str:
    """Return a name in DTYPES. Raise UsageError if the device lacks it."""
    bf16, why = is_faster_in_bf16(device)
    precision: str = choices.choose("precision", wanted, "bf16" if bf16 else "fp32", why)
    if precision == "tf32" and (device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UsageError(f"engine.precision tf32: {device} lacks it (an A100 or newer has it); use fp32")
    if precision == "bf16" and device.type == "cuda" and not bf16:
        raise UsageError(f"engine.precision bf16: {why}; use fp16 or fp32")
    return precision


def _check_norm(norm: str, config: Config, device: torch.device, precision: str) -> None:
    """Raise UsageError if a requested norm cannot run here."""
    if norm == "fused" and device.type == "cuda" and not HAS_TRITON:
        raise UsageError("model.norm fused: the kernels need Triton; pip install triton, or use torch")
    if norm == "apex":
        apex, why = find_apex(APEX_NORM)
        if apex is None:
            raise UsageError(f"model.norm apex: {why}; use torch or fused")
        if precision != "fp16" or not config.engine.channels_last:
            raise UsageError("model.norm apex: apex's kernels take channels-last fp16 only; --engine.precision fp16")
    if norm == "fused" and not config.engine.channels_last:
        raise UsageError("model.norm fused: the kernels take channels-last only; leave engine.channels_last true")
    if config.model.sync_norm and norm == "apex":
        raise UsageError("model.sync_norm true: norm apex shares no statistics here; use fused or torch")


def can_compile(device: torch.device) -> tuple[bool, str]:
    """Return True if torch.compile can run here, and the reason in words, with the remedy if it cannot."""
    if device.type == "cuda":
        if not HAS_TRITON:
            return False, "Triton is not installed: pip install triton"
        # Triton builds its launcher at the first launch. On Windows it comes with a compiler.
        compiler = os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
        if sys.platform != "win32" and shutil.which(compiler) is None:
            return False, "no C compiler for Triton on the PATH: apt-get install gcc"
        missing = "" if sys.platform == "win32" else _missing_headers()
        return not missing, missing or "Triton is installed"
    if sys.platform == "win32":
        found = shutil.which("cl") is not None
        return (found, "the C++ compiler is installed" if found else "no C++ compiler: run from a Visual Studio prompt")
    # The compiler that inductor looks for.
    compiler = os.environ.get("CXX", "g++" if sys.platform == "linux" else "clang++")
    if shutil.which(compiler) is None:
        remedy = "apt-get install g++" if sys.platform == "linux" else "xcode-select --install"
        return False, f"no C++ compiler {compiler} on the PATH: {remedy}"
    missing = _missing_headers()
    return not missing, missing or f"the C++ compiler {compiler} is installed"


def _missing_headers() -> str:
    """Return the error that Python's headers are missing, with the remedy, or an empty text if they are installed."""
    installed = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    return "" if installed else "no Python headers: apt-get install python3-dev"


def cuda_graph_support(config: Config, device: torch.device) -> tuple[bool, str, str]:
    """Return True if this run's steps can be CUDA graphs, the reason in words, and the remedy if they cannot."""
    if device.type != "cuda":
        return False, "CUDA graphs are for GPUs", "set it to auto"
    if ranks.world_size() > 1:
        why = f"{ranks.world_size()} processes exchange gradients in every step, which is not captured"
        return False, why, "use one process, or set it to auto"
    if config.data.loader != "resident":
        why = f"the batches of data.loader {config.data.loader} are made outside of the step"
        return False, why, "use --data.loader resident, or set it to auto"
    if config.optim.name == "apex_sgd":
        why = f"optim.name {config.optim.name} reads the learning rate on the host"
        return False, why, "use --optim.name sgd, or set it to auto"
    return True, "one process, and the data set is on the GPU", ""


def _norm_in_cpp(device: torch.device, precision: str, compiles: bool, channels_last: bool) -> tuple[bool, str]:
    """Return True if the C++ norm was measured to be faster here, and the reason. It is built if all else fits."""
    if device.type == "cpu" and precision not in ("bf16", "fp32"):
        return False, f"the C++ norm computes in bf16 and fp32, not {precision}"
    if problem := _no_cpp(device, compiles, channels_last):
        return False, problem
    isa, missing = instruction_set()
    if not missing and not cpu_table.is_measured(isa):
        return False, f"the C++ norm was not measured to be faster with {isa}"
    return cpp_norm.available()


def _conv_in_cpp(device: torch.device, precision: str, compiles: bool, channels_last: bool) -> tuple[bool, str]:
    """Return True if the C++ convolutions were measured to be faster here, and the reason. They are built if so."""
    if device.type == "cpu" and precision not in ("bf16", "fp32"):
        return False, f"the C++ convolutions compute in bf16 and fp32, not {precision}"
    if problem := _no_cpp(device, compiles, channels_last):
        return False, problem
    return cpp_conv.available(DTYPES[precision])


def _no_cpp(device: torch.device, compiles: bool, channels_last: bool) -> str:
    """Return the reason why no C++ kernel can run with these settings, or an empty text."""
    if device.type != "cpu":
        return "the C++ kernels are for CPUs"
    if compiles:
        return "torch.compile does not see into the C++ kernels"
    return "" if channels_last else "the C++ kernels take channels-last only"


def _faster_norm(config: Config, device: torch.device, precision: str, in_cpp: bool, why: str) -> tuple[str, str]:
    """Return auto's choice of the norm and the reason in words, given the result of _norm_in_cpp."""
    on_gpu = device.type == "cuda"
    if on_gpu and not HAS_TRITON:
        return "torch", "the fused kernels need Triton: pip install triton"
    if config.model.sync_norm and config.engine.channels_last:
        return "fused", "it shares statistics between processes"
    if not on_gpu:
        return ("measured", f"fused or torch for each shape, as measured; {why}") if in_cpp else ("torch", why)
    if not config.engine.channels_last:
        return "torch", "the fused kernels take channels-last only"
    if precision != "bf16":
        return "torch", f"the fused kernels were measured in bf16, not in {precision}"
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    if dispatch_table.table_of(device) is None:
        return "torch", f"the fused kernels were not measured at compute capability {capability}"
    return "measured", f"fused or torch for each shape, as measured at compute capability {capability}"


def find_apex(part: str) -> tuple[ModuleType | None, str]:
    """Return the module apex.PART of NVIDIA's apex, or None, and the reason. PyPI's apex is another project."""
    try:
        return importlib.import_module(f"apex.{part}"), "apex is installed"
    except ImportError as error:
        if importlib.util.find_spec("apex") is None:
            return None, "NVIDIA's apex is not installed"
        if importlib.util.find_spec("apex.optimizers") is None:
            return None, "the apex installed here is not NVIDIA's: pip uninstall apex, then build NVIDIA's"
        return None, f"NVIDIA's apex was built without apex.{part}: {error}"
