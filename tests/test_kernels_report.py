"""Test the kernels' report as a user runs it: compiled kernels, counts and errors."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastres_kernels.report import KernelCost, faults, widest_access


def report(*args: str | Path, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `python -m fastres_kernels.report ARGS`; the kernels are interpreted only if `interpret` is True."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fastres_kernels.report", *map(str, args)],
        env=env | {"TRITON_INTERPRET": "1"} if interpret else env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_kernels_compile_without_spills_and_a_block_moves_less_than_inductors(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    # All variants of one kernel, and at least one variant of every other kernel.
    only = (
        *("normalise, bf16", "bf16, add + ReLU, C=16", "given statistics, C=16"),
        *("statistics, bf16, -, C=16", "16 -> 16", "running statistics"),
    )
    done = report("--only", *only, "--output", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["versions"].keys() == {"torch", "triton", "ptxas"}

    kernels = result["kernels"]
    assert {kernel["target"] for kernel in kernels} == {"sm_80", "sm_90"}
    for kernel in kernels:
        assert kernel["spills"] == kernel["float64"] == 0
        rows_start_anywhere = kernel["name"].endswith("C=5")
        if kernel["name"].startswith("normalise") and not rows_start_anywhere:
            assert kernel["widest_load"] == kernel["widest_store"] == 16
        (line,) = (
            line
            for line in done.stdout.splitlines()
            if line.startswith(kernel["name"] + " ") and kernel["target"] in line
        )
        assert str(kernel["registers"]) in line.split()

    moved = {
        block: sum(part["kernel_bytes_per_element"] + part["convolution_bytes_per_element"] for part in passes.values())
        for block, passes in result["blocks"].items()
    }
    # 36 passes of 2 bytes, counted by hand in the code of torch 2.11 and 2.14; another version may do better.
    assert 62 < moved["torch"] <= 80
    # 31 passes of 2 bytes, and one bit of mask that is written and read.
    assert moved["two_pass"] <= 62.25
    assert moved["cooperative"] < moved["two_pass"]
    # Two convolutions: 2 × 2 passes of 2 bytes forward, 2 × 4 backward.
    for passes in result["blocks"].values():
        assert [passes[name]["convolution_bytes_per_element"] for name in ("forward", "backward")] == [8, 16]


def test_each_fault_is_a_line_with_the_kernels_name() -> None:
    good = KernelCost(
        name="normalise, bf16",
        target="sm_90",
        registers=128,
        spills=0,
        shared=1024,
        bytes_per_element=4,
        widest_load=16,
        widest_store=16,
        float64=0,
    )
    assert faults(good, 90) == []
    bad = dataclasses.replace(good, spills=24, shared=2**18, float64=3)
    assert len(lines := faults(bad, 90)) == 3
    assert all(line.startswith("normalise, bf16, sm_90: ") for line in lines)
    assert "spills 24 bytes" in lines[0]


@pytest.mark.parametrize(
    ("instruction", "loaded", "stored"),
    [
        ("@%p1 ld.global.L1::evict_last.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ], %rd2;", 16, 0),
        ("ld.global.b16 %rs1, [%rd1];", 2, 0),
        ("cp.async.cg.shared.global [ %r5 + 0 ], [ %rd1 + 0 ], 0x10, %r6;", 16, 0),
        ("@%p2 st.global.v2.b32 [ %rd3 + 0 ], { %r7, %r8 };", 0, 8),
        ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];", 0, 0),
    ],
)
def test_the_width_of_an_access_is_read_from_its_instruction(instruction: str, loaded: int, stored: int) -> None:
    assert (widest_access(instruction, "ld"), widest_access(instruction, "st")) == (loaded, stored)


def test_there_is_nothing_to_report_when_interpreting() -> None:
    done = report(interpret=True)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "TRITON_INTERPRET" in line
