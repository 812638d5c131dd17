"""Describe the variants in which the kernels are compiled, taken from real launches.

report.py compiles the variants, and inductor_counts.py looks them up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..triton_launch import recording

# Each module has a function variants() -> list[CompiledVariant].
FILES = ("batchnorm_variants", "convolution_variants")
# (N, C, H, W) of ResNet-20's stages at batch 128; inductor_counts.py counts a block of the first stage.
RESNET20 = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8))

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, kw_only=True)
class CompiledVariant:
    """A form in which a kernel is compiled, as torch.compile launches it."""

    name: str  # "normalise, bf16, add + ReLU, C=16"
    kernel: Any  # the triton.jit function
    # Argument -> "*bf16", "*fp32", "*u8", "i32", "fp32", "constexpr". As in triton.tools.compile, "i32:16" is a
    # multiple of 16. Triton's launcher detects multiples of 16 itself, and only for them does Triton generate accesses
    # of 16 bytes. Pointers count as multiples of 16, because torch's allocator aligns them.
    signature: dict[str, str]
    constants: dict[str, Any]  # the values of the "constexpr" arguments
    num_warps: int = 4
    num_stages: int = 3  # Triton's default
    maxnreg: int | None = None  # maximum number of registers per thread
    bytes_per_element: float | None  # bytes of global memory that the maths needs; None: independent of the activation

    @property
    def types(self) -> dict[str, str]:
        """The signature in the order of the arguments, without the suffix ":16"."""
        return {argument: self.signature[argument].removesuffix(":16") for argument in self.kernel.arg_names}

    @property
    def multiples_of_16(self) -> list[int]:
        """The positions of the arguments that are multiples of 16."""
        return [
            position
            for position, argument in enumerate(self.kernel.arg_names)
            if self.signature[argument].startswith("*") or self.signature[argument].endswith(":16")
        ]


def variant_from_launch(
    name: str, launch: Callable[[], Any], moved: Callable[[dict[str, Any]], float | None]
) -> CompiledVariant:
    """Return the variant of the only kernel that `launch()` launches.

    The kernel does not run, so tensors may be on the meta device. `moved` maps the kernel's flags to bytes per element.
    """
    with recording() as launches:
        launch()
    ((kernel, opaque, arguments, options),) = launches
    # Triton's launcher passes a Python float as fp32, torch.compile as fp64.
    of_float = "fp32" if opaque else "fp64"
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {option: value for option, value in options.items() if option in kernel.arg_names}
    signature, constants = {}, {}
    for argument, value in values.items():
        if isinstance(value, Tensor):
            signature[argument] = TYPES[value.dtype]
        elif argument in options or value == 1 or value is None:
            # Triton turns every argument that is 1 or None into a constant.
            signature[argument], constants[argument] = "constexpr", value
        else:
            signature[argument] = of_float if isinstance(value, float) else "i32" if value % 16 else "i32:16"
    known = {option: options[option] for option in ("num_warps", "num_stages", "maxnreg") if option in options}
    return CompiledVariant(
        name=name, kernel=kernel, signature=signature, constants=constants, bytes_per_element=moved(options), **known
    )


def declared_variants() -> list[CompiledVariant]:
    """Return the variants of all FILES. Imports Triton."""
    files = [import_module(f".{file}", __package__) for file in FILES]
    return [variant for file in files for variant in file.variants()]
