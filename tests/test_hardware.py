"""fastres/utils/hardware.py guesses nothing, raises nothing, and reports disturbances of a measurement."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastres.utils import hardware
from fastres.utils.hardware import (
    PEAKS,
    OtherLoad,
    cpu_times,
    disturbances,
    measured_copy,
    measured_matmul,
    peaks_of,
    snapshot,
)
from fastres.utils.precision import is_faster_in_bf16
from tests.commands import run_module

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
    times = {"unix_time_s": 10.0, "own_s": 5.0, "all_s": 20.0}
    busy = {"unix_time_s": 12.0, "own_s": 7.0, "all_s": 24.5}  # 4.5 s in all, 2 s of them this run's
    quiet = {"host": {"cpus": 2, "cpu_times": times, "governor": "performance"}, "gpu": None}
    unknown = {"host": {"cpus": 2, "cpu_times": None, "governor": None}, "gpu": None}
    loud = {"host": {"cpus": 2, "cpu_times": busy, "governor": "performance"}, "gpu": None}
    slow = {"host": {"cpus": 2, "cpu_times": times, "governor": "powersave"}, "gpu": None}
    idle = {**quiet, "gpu": {"other_processes": [], "throttled": ["idle"]}}
    assert disturbances(quiet, quiet) == disturbances(unknown, unknown) == disturbances(idle, idle) == []
    assert disturbances(quiet, loud) == ["other processes used 1.2 of 2 CPU cores"]
    assert disturbances(slow, slow) == ["the CPU's frequency governor is powersave"]


# ---- other processes -----------------------------------------------------------------------------------------

BUSY = "while True: pass"


@contextmanager
def busy_elsewhere(processes: int = 1) -> Iterator[None]:
    """Keep cores busy by processes that are not children of this one: their parent ends at once."""
    start = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=-3, stderr=-3).pid)"
    )
    command = [sys.executable, "-c", start, BUSY]
    pids = [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(processes)]
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_cpu_time_of_children_is_the_runs_own() -> None:
    before = cpu_times()
    child = subprocess.Popen([sys.executable, "-c", BUSY])
    time.sleep(1.5)
    running = cpu_times()
    child.kill()
    child.wait()
    ended = cpu_times()
    assert running["own_s"] - before["own_s"] > 0.2
    assert ended["own_s"] >= running["own_s"], "the time of a child that has ended is kept"
    assert running["all_s"] - before["all_s"] > 0.2


def test_a_run_whose_cores_are_taken_gets_one_line_with_the_remedy() -> None:
    load = OtherLoad(threads=len(os.sched_getaffinity(0)))
    assert load.line(900.0) is None, "no reading within two seconds"
    with busy_elsewhere():
        time.sleep(2.5)
        line = load.line(100.0)
        time.sleep(2.5)
        again = load.line(100.0)
    assert line is not None and again is None
    assert re.fullmatch(
        r"other processes use \d+\.\d of the \d+ CPU cores and slow this run: 100 images/s \(900 before\); "
        r"end them(, or start with OMP_NUM_THREADS=\d+)?",
        line,
    )


def test_a_run_that_leaves_others_their_core_gets_no_line() -> None:
    cpus = len(os.sched_getaffinity(0))
    for threads, speaks in ((cpus - 1, False), (cpus, True)):
        load = OtherLoad(threads=threads)
        now = cpu_times()
        load.times = now | {"unix_time_s": now["unix_time_s"] - 10, "all_s": now["all_s"] - 10}  # others used one core
        assert (load.line(100.0) is not None) == speaks


@pytest.mark.slow
def test_train_says_that_other_processes_slow_it(tmp_path: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    with busy_elsewhere(processes=cpus):
        flags = ["--recipe", "digits", "--run.dir", tmp_path / "run", "--train.steps", "600", "--train.log_every", "50"]
        # With fewer threads than cores, the scheduler may give the run all that it needs.
        done = run_module("fastres.train", *flags, env={"OMP_NUM_THREADS": str(cpus)}, fresh=True)
    assert done.returncode == 0 and done.stdout.count("other processes use") == 1


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "maker", "answer"),
    [(True, True, "GenuineIntel", (True, "the CPU has AMX")),
     (False, True, "AuthenticAMD", (True, "the CPU has avx512_bf16")),
     (False, True, "GenuineIntel", (False, "the CPU has no AMX, and Intel's avx512_bf16 is slower than fp32")),
     (False, False, "AuthenticAMD", (False, "the CPU has neither avx512_bf16 nor AMX"))],
)  # fmt: skip
def test_a_cpu_computes_in_bf16_by_default_only_if_that_is_faster(
    amx: bool, avx512_bf16: bool, maker: str, answer: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: f"vendor_id : {maker}")
    assert is_faster_in_bf16(torch.device("cpu")) == answer
