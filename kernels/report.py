"""Report the cost of the kernels without a GPU: registers, spills, shared memory, access widths, bytes, launches.

    python -m fastres_kernels.report                    everything: a minute with Triton's cache filled, five without
    python -m fastres_kernels.report --only normalise   only kernels with "normalise" in their name

Every variant that analysis/ declares is compiled ahead of time for sm_80 and sm_90, as torch.compile launches it. A
second table shows the bytes and launches of a basic residual block, with torch's BatchNorm and with these kernels;
analysis/inductor_counts.py describes how they are counted.

Exit status: 1 if a kernel cannot be compiled, spills registers, needs more shared memory than the GPU has, or computes
in float64; 2 if Triton is missing or interprets.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .analysis.compiled_variants import RESNET20, CompiledVariant, declared_variants
from .analysis.text_table import table
from .tiling import BACKWARD_TILE, FORWARD_TILE, H100, one_pass_tiles
from .triton_launch import HAS_TRITON, INTERPRETED

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # compute capability -> bytes that a CTA can have


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """The cost of a variant, compiled for one target."""

    name: str
    target: str  # "sm_80"
    registers: int  # per thread
    spills: int  # bytes of stack per thread; these kernels use the stack for nothing else
    shared: int  # bytes per CTA
    bytes_per_element: float | None
    widest_load: int  # bytes of a thread's widest access to global memory; the hardware allows 16
    widest_store: int
    float64: int  # number of instructions that compute in float64


# ---- compiling ---------------------------------------------------------------------------------------------


def compile_ahead(variant: CompiledVariant, capability: int) -> KernelCost:
    """Compile the variant for a GPU of that compute capability, and return its cost. No GPU needs to be present.

    Triton caches the compiled kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(
        fn=variant.kernel,
        signature=variant.types,
        constexprs=variant.constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in variant.multiples_of_16},
    )
    options = {name: getattr(variant, name) for name in ("num_warps", "num_stages", "maxnreg")}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = resource_usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return KernelCost(
        name=variant.name,
        target=f"sm_{capability}",
        registers=registers,
        spills=stack,
        shared=kernel.metadata.shared,
        bytes_per_element=variant.bytes_per_element,
        widest_load=widest_access(ptx, "ld"),
        widest_store=widest_access(ptx, "st"),
        float64=len(re.findall(r"(?<!\S)(?!(?:cvt|mov|ld|st)\.)\w+(?:\.\w+)*\.f64\b", ptx)),
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack per thread of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (max(map(int, re.findall(rf"{what}:(\d+)", usage))) for what in ("REG", "STACK"))
    return registers, stack


def widest_access(ptx: str, direction: str) -> int:
    """Return the bytes of a thread's widest load ("ld") or store ("st") of global memory; 0 if there is none."""
    accesses = re.findall(rf"\b{direction}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    widths = [int(vector or 1) * int(bits) // 8 for vector, bits in accesses]
    if direction == "ld":  # asynchronous copies from global into shared memory
        widths += [int(size, 16) for size in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?, 0x(\w+)", ptx)]
    return max(widths, default=0)


def faults(kernel: KernelCost, capability: int) -> list[str]:
    """Return a line for each property of the kernel that makes the report fail."""
    found = []
    if kernel.spills:
        found.append(f"spills {kernel.spills} bytes per thread")
    if kernel.shared > SHARED_MEMORY[capability]:
        found.append(f"needs {kernel.shared} bytes of shared memory; the GPU has {SHARED_MEMORY[capability]} per CTA")
    if kernel.float64:
        # torch.compile passes a Python float to a kernel as float64, and expressions with that float become float64.
        found.append(f"has {kernel.float64} instructions in float64")
    return [f"{kernel.name}, {kernel.target}: {fault}" for fault in found]


# ---- the command -------------------------------------------------------------------------------------------


def main() -> int:
    """Compile the kernels, count the residual blocks, print both tables, and return the exit status."""
    parser, options = parse_arguments()
    if not HAS_TRITON or INTERPRETED:
        why = "TRITON_INTERPRET is set; unset it" if HAS_TRITON else "Triton is not installed; pip install triton"
        print(f"fastres_kernels.report: cannot compile kernels, because {why}", file=sys.stderr)
        return 2
    variants = [variant for variant in declared_variants() if any(text in variant.name for text in options.only)]
    if not variants:
        parser.error(f"--only: no kernel has {' or '.join(map(repr, options.only))} in its name")

    with count_blocks() as counting:  # while the kernels are compiled
        kernels, wrong = compile_all(variants)
        print("counting bytes and launches of a residual block under torch.compile", file=sys.stderr)
        output, errors = counting.communicate()
    blocks = {} if counting.returncode else json.loads(output)
    if counting.returncode:
        wrong.append(f"inductor_counts: {errors}")

    versions = tool_versions()
    print(", ".join(f"{name} {version}" for name, version in versions.items()), end="\n\n")
    print(kernel_table(kernels), end="\n\n")
    print(block_table(blocks))
    print(cooperative_shapes())
    if options.output:
        result = {"versions": versions, "kernels": [asdict(kernel) for kernel in kernels], "blocks": blocks}
        options.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for fault in wrong:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0


def user_path(text: str) -> Path:
    """Return the path that an argument names, ~ expanded. Raise ArgumentTypeError if a user has no home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: no such home folder; give the whole path") from None


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser, for error messages, and the parsed options."""
    parser = argparse.ArgumentParser(
        prog="python -m fastres_kernels.report",
        description="Report the cost of the kernels without a GPU.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="Compile only kernels whose name contains one of these texts.",
    )
    parser.add_argument("--output", type=user_path, metavar="FILE", help="JSON file for all results and versions.")
    parser.add_argument("--json", type=user_path, help=argparse.SUPPRESS)  # the old spelling, for one version
    options = parser.parse_args()
    if options.json:
        print("fastres_kernels: --json is now --output; the old spelling works for one version", file=sys.stderr)
        options.output = options.json
    return parser, options


def compile_all(variants: list[CompiledVariant]) -> tuple[list[KernelCost], list[str]]:
    """Compile the variants for all targets, and return their costs and one line per fault."""
    from triton.errors import TritonError

    kernels, wrong = [], []
    for number, variant in enumerate(variants, 1):
        print(f"compiling {number}/{len(variants)}: {variant.name}", file=sys.stderr)
        for capability in SHARED_MEMORY:
            try:
                kernels.append(compile_ahead(variant, capability))
            except TritonError as error:
                wrong.append(f"{variant.name}, sm_{capability}: {error}")
            else:
                wrong += faults(kernels[-1], capability)
    return kernels, wrong


def tool_versions() -> dict[str, str]:
    """Return the versions of torch, Triton and ptxas."""
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version}


def count_blocks() -> subprocess.Popen[str]:
    """Start analysis.inductor_counts, which prints JSON, in a process that sees no GPU.

    That process replaces torch's functions so that inductor finds an H100; a GPU that is present would interfere.
    """
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.analysis.inductor_counts"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kernel_table(kernels: list[KernelCost]) -> str:
    """Format the costs of the kernels, one per row."""
    return table(
        ["kernel", "target", "registers", "spills", "shared", "bytes/element", "widest load", "widest store"],
        [
            [
                *(kernel.name, kernel.target, kernel.registers, kernel.spills, kernel.shared),
                "-" if kernel.bytes_per_element is None else f"{kernel.bytes_per_element:g}",
                *(kernel.widest_load, kernel.widest_store),
            ]
            for kernel in kernels
        ],
    )


def block_table(blocks: dict[str, Any]) -> str:
    """Format the result of inductor_counts.py. The number of kernels excludes convolutions."""
    names = {
        "torch": "torch.nn.BatchNorm2d",
        "two_pass": "BatchNormAct2d, two_pass",
        "cooperative": "BatchNormAct2d, cooperative",
    }
    rows = []
    for block, passes in blocks.items():
        moved = [passes[name]["kernel_bytes_per_element"] for name in ("forward", "backward")]
        moved.append(sum(part["convolution_bytes_per_element"] for part in passes.values()))
        kernels = sum(part["kernels"] for part in passes.values())
        rows.append([names[block], *(f"{number:g}" for number in (*moved, sum(moved), kernels))])
    return table(
        ["basic block in bf16, bytes/element", "forward", "backward", "convolutions", "total", "kernels"], rows
    )


def cooperative_shapes() -> str:
    """Return a note on the table's last row that lists the ResNet-20 tensors for which cooperative kernels exist."""
    lines = ["cooperative: one kernel if the tensor fits on an H100 at once, else two_pass. In ResNet-20 (N×C×H×W):"]
    for name, tile in (("forward", FORWARD_TILE), ("backward", BACKWARD_TILE)):
        fitting = [
            f"{n}×{c}×{h}×{w}" + " (this block)" * ((n, c, h, w) == RESNET20[0])
            for n, c, h, w in RESNET20
            if one_pass_tiles(n * h * w, c, tile, H100)
        ]
        lines.append(f"    {name:8}  {', '.join(fitting)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
