"""fastres/utils/hardware.py guesses nothing, raises nothing, and reports disturbances of a measurement."""

from __future__ import annotations

import math
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastres.utils import hardware
from fastres.utils.hardware import PEAKS, disturbances, measured_copy, measured_matmul, peaks_of, snapshot

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# ---- data sheets


def test_a_device_that_is_not_in_the_table_has_no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peaks_of(CPU) is None
    for name in ("NVIDIA H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "an imaginary GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peaks_of(CUDA) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    peaks = peaks_of(CUDA)
    assert peaks is not None
    assert peaks.flops == {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12}
    assert peaks.bytes_per_s == 2039e9


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_are_consistent_with_each_other(name: str) -> None:
    peaks = PEAKS[name]
    flops = peaks.flops
    assert 0.1e12 < peaks.bytes_per_s < 10e12
    if "V100" in name:  # older than bf16 and tf32
        assert set(flops) == {"fp32", "fp16"}
        return
    assert flops["bf16"] == flops["fp16"]
    # A tensor core has twice as many half-precision products as tf32 ones, with and without sparsity, up to
    # 1 %, because data sheets round.
    assert flops["bf16"] / flops["tf32"] == pytest.approx(2, rel=0.015)


def test_peaks_are_without_sparsity() -> None:
    dense = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "NVIDIA B200": 2250}
    for name, tflops in dense.items():
        assert PEAKS[name].flops["bf16"] == pytest.approx(1e12 * tflops, rel=1e-3)


# ---- measured


def test_the_machines_own_limits_are_measured() -> None:
    for figure in (measured_copy(CPU, rounds=1), measured_matmul(CPU, "fp32", rounds=1)):
        assert math.isfinite(figure) and figure > 0


# ---- state


def test_the_state_of_this_machine() -> None:
    state = snapshot(CPU)
    assert state["gpu"] is None and state["unknown"]["gpu"] == "the device is cpu"
    host = state["host"]
    assert host["cpus"] >= 1
    for field, value in host.items():  # each is known, or has a reason why not
        assert (value is None) == bool(state["unknown"].get(f"host.{field}"))


def test_a_gpu_without_nvml_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    state = snapshot(CUDA)
    assert state["gpu"] is None
    assert "pip install nvidia-ml-py" in state["unknown"]["gpu"]


class NoSupport(Exception):
    def __str__(self) -> str:
        return "Not Supported"


def not_supported(*_: object) -> Any:
    raise NoSupport


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return an NVML with one GPU that does not report its temperature."""
    clocks = {"sm": 1755, "memory": 2619}
    throttled_ns = {"power": 5 * 10**9, "thermal": 0}
    processes = [SimpleNamespace(pid=pid, usedGpuMemory=2**30) for pid in (os.getpid(), 4242)]
    module = SimpleNamespace(
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU=0,
        NVML_PERF_POLICY_POWER="power",
        NVML_PERF_POLICY_THERMAL="thermal",
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-abc": "the gpu"}.__getitem__,
        nvmlSystemGetDriverVersion=lambda: "580.65",
        nvmlDeviceGetName=lambda gpu: f"{gpu}'s name",
        nvmlDeviceGetClockInfo=lambda gpu, which: clocks[which],
        nvmlDeviceGetMaxClockInfo=lambda gpu, which: 1980,
        nvmlDeviceGetPowerUsage=lambda gpu: 412_500,
        nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
        nvmlDeviceGetTemperature=not_supported,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=97),
        nvmlDeviceGetViolationStatus=lambda gpu, policy: SimpleNamespace(violationTime=throttled_ns[policy]),
        nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 0x04 | 0x40,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: processes,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    return module


def test_the_state_of_a_gpu(nvml: SimpleNamespace) -> None:
    state = snapshot(CUDA)
    assert state["gpu"] == {
        "name": "the gpu's name",
        "driver": "580.65",
        "sm_mhz": 1755,
        "sm_max_mhz": 1980,
        "memory_mhz": 2619,
        "power_w": 412.5,
        "power_limit_w": 700.0,
        "temperature_c": None,
        "utilisation": 0.97,
        "throttled": ["power cap", "temperature (hardware)"],
        "throttled_ns": {"power cap": 5 * 10**9, "temperature": 0},
        "other_processes": [{"pid": 4242, "bytes": 2**30}],
    }
    assert state["unknown"]["gpu.temperature_c"] == "Not Supported"
    lines = disturbances(state, state)
    assert "1 other process(es) used the GPU" in lines
    assert "the GPU was throttled at the end: power cap, temperature (hardware)" in lines
    assert not any("during the measurement" in line for line in lines)


def test_clocks_throttled_between_two_snapshots_are_a_disturbance(nvml: SimpleNamespace) -> None:
    """At both snapshots the GPU is idle, and nothing throttles it."""
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda gpu: 0x01
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda gpu: []
    before, after = snapshot(CUDA), snapshot(CUDA)
    after["gpu"]["throttled_ns"] = {"power cap": 12 * 10**9, "temperature": 0}
    assert disturbances(before, after)[-1] == "the GPU was throttled during the measurement: power cap 7.0 s"
    before["gpu"]["throttled_ns"] = None  # not told
    assert not any("during the measurement" in line for line in disturbances(before, after))


def test_an_nvml_that_fails_altogether_is_survived(nvml: SimpleNamespace) -> None:
    nvml.nvmlInit = not_supported
    state = snapshot(CUDA)
    assert state["gpu"] is None and state["unknown"]["gpu"] == "Not Supported"


def test_an_unreadable_value_is_none_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "HOST_FIELDS", hardware.HOST_FIELDS | {"mhz": not_supported})
    state = snapshot(CPU)
    assert state["host"]["mhz"] is None and state["unknown"]["host.mhz"] == "Not Supported"


def test_disturbances_are_reported_and_a_quiet_machine_has_none() -> None:
    quiet = {"host": {"cpus": 2, "other_runnable": 0, "governor": "performance"}, "gpu": None}
    unknown = {"host": {"cpus": 2, "other_runnable": None, "governor": None}, "gpu": None}
    loud = {"host": {"cpus": 2, "other_runnable": 3, "governor": "powersave"}, "gpu": None}
    idle = {**quiet, "gpu": {"other_processes": [], "throttled": ["idle"]}}
    assert disturbances(quiet, quiet) == disturbances(unknown, unknown) == disturbances(idle, idle) == []
    assert disturbances(loud, loud) == [
        "3 other thread(s) were running at the start, on 2 CPUs",
        "the CPU's frequency governor is powersave",
    ]
