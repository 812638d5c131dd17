"""A device's data sheet, the rates measured on it, and the state of the machine.

Nothing is guessed: a device that is not in PEAKS has no peaks, and a field that cannot be read is None with the reason.
measured_copy and measured_matmul have not yet run on a GPU, and gpu_fields has not yet met a real NVML.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastres.utils import ranks
from fastres.utils.errors import first_line
from fastres.utils.precision import DTYPES
from fastres.utils.timing import interleaved, time_region

# ------------------------------------------------------------------------------------------- data sheets


@dataclass(frozen=True)
class Peaks:
    """A data sheet's peak rates."""

    flops: Mapping[str, float]  # dense FLOP/s by precision, for the precisions that the device has
    bytes_per_s: float


def _peaks(fp32: float, tf32: float | None, bf16: float | None, fp16: float, gb_per_s: float) -> Peaks:
    """Return Peaks from TFLOP/s and GB/s."""
    tflops = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16}
    return Peaks({name: 1e12 * value for name, value in tflops.items() if value}, 1e9 * gb_per_s)


# Keys are the names that torch.cuda.get_device_name returns. Figures are dense, so if a sheet gives a figure only with
# sparsity, the table has half of it. For GeForce cards, bf16 and fp16 accumulate in fp32, which torch requests.
PEAKS: dict[str, Peaks] = {
    # "NVIDIA A100 Tensor Core GPU", data sheet 2021; the 40 GB parts: "NVIDIA A100 ... Architecture", table 4
    "NVIDIA A100-SXM4-40GB": _peaks(19.5, 156, 312, 312, 1555),
    "NVIDIA A100-PCIE-40GB": _peaks(19.5, 156, 312, 312, 1555),
    "NVIDIA A100-SXM4-80GB": _peaks(19.5, 156, 312, 312, 2039),
    "NVIDIA A100 80GB PCIe": _peaks(19.5, 156, 312, 312, 1935),
    # "NVIDIA H100 Tensor Core GPU", data sheet: SXM and NVL 2024, PCIe 2022; tensor cores with sparsity
    "NVIDIA H100 80GB HBM3": _peaks(67, 989 / 2, 1979 / 2, 1979 / 2, 3350),
    "NVIDIA H100 PCIe": _peaks(51, 756 / 2, 1513 / 2, 1513 / 2, 2000),
    "NVIDIA H100 NVL": _peaks(60, 835 / 2, 1671 / 2, 1671 / 2, 3900),
    # "NVIDIA H200 Tensor Core GPU", data sheet 2024: SXM, NVL; tensor cores with sparsity
    "NVIDIA H200": _peaks(67, 989 / 2, 1979 / 2, 1979 / 2, 4800),
    "NVIDIA H200 NVL": _peaks(60, 835 / 2, 1671 / 2, 1671 / 2, 4800),
    # "NVIDIA HGX B200", data sheet, an eighth of 8 GPUs: FP32 600 TFLOPS, TF32 18 and BF16 36 PFLOPS with sparsity;
    # "NVIDIA DGX B200", data sheet: 64 TB/s
    "NVIDIA B200": _peaks(600 / 8, 18_000 / 16, 36_000 / 16, 36_000 / 16, 64_000 / 8),
    # "NVIDIA L4 Tensor Core GPU", data sheet 2023; tensor cores with sparsity
    "NVIDIA L4": _peaks(30.3, 120 / 2, 242 / 2, 242 / 2, 300),
    # "NVIDIA L40S", data sheet 2023: dense | with sparsity
    "NVIDIA L40S": _peaks(91.6, 183, 362.05, 362.05, 864),
    # "NVIDIA A10 Tensor Core GPU", data sheet 2021: dense | with sparsity
    "NVIDIA A10": _peaks(31.2, 62.5, 125, 125, 600),
    # "NVIDIA V100 Tensor Core GPU", data sheet 2020: NVLink, PCIe
    "Tesla V100-SXM2-16GB": _peaks(15.7, None, None, 125, 900),
    "Tesla V100-SXM2-32GB": _peaks(15.7, None, None, 125, 900),
    "Tesla V100-PCIE-16GB": _peaks(14, None, None, 112, 900),
    "Tesla V100-PCIE-32GB": _peaks(14, None, None, 112, 900),
    # "NVIDIA Ampere GA102 GPU Architecture", appendix A
    "NVIDIA GeForce RTX 3090": _peaks(35.6, 35.6, 71, 71, 936),
    # "NVIDIA Ada GPU Architecture", appendix A
    "NVIDIA GeForce RTX 4090": _peaks(82.6, 82.6, 165.2, 165.2, 1008),
    # "NVIDIA RTX Blackwell GPU Architecture", appendix A
    "NVIDIA GeForce RTX 5090": _peaks(104.8, 104.8, 209.5, 209.5, 1792),
}


def peaks_of(device: torch.device) -> Peaks | None:
    """Return the data sheet's peaks, or None if the device is not in the table."""
    return PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


# ------------------------------------------------------------------------------------------- measured


def measured_copy(device: torch.device, rounds: int = 5) -> float:
    """Return the bytes per second, read and written, of a copy larger than the caches: the best of the rounds."""
    gpu = device.type == "cuda"
    source = torch.randn(2**26 if gpu else 2**24, device=device)  # 256 MB, 64 MB
    target = torch.empty_like(source)
    copies = 20 if gpu else 1

    def region() -> None:
        for _ in range(copies):
            target.copy_(source)

    timing = interleaved({"copy": region}, rounds, device, warm_up=2)["copy"]
    return 2 * source.nbytes * copies / min(timing.seconds)


def measured_matmul(device: torch.device, precision: str, rounds: int = 5) -> float:
    """Return the FLOP/s of a product of square matrices under torch's current switches: the best of the rounds."""
    # Grow the matrices until a product takes a while: a CPU may be a thousand times slower in fp16 than in bf16.
    n, largest, enough_s = (2048, 8192, 0.005) if device.type == "cuda" else (256, 2048, 0.02)
    while True:
        a, b = torch.randn(2, n, n, device=device).to(DTYPES[precision])
        torch.mm(a, b)
        if n == largest or min(time_region(partial(torch.mm, a, b), device) for _ in range(3)) >= enough_s:
            break
        n *= 2
    timing = interleaved({"matmul": partial(torch.mm, a, b)}, rounds, device)["matmul"]
    return 2 * n**3 / min(timing.seconds)


# ------------------------------------------------------------------------------------------- state

# nvmlClocksEventReasons
THROTTLE_REASONS = {
    0x001: "idle",
    0x002: "clocks set by the application",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "temperature (software)",
    0x040: "temperature (hardware)",
    0x080: "power brake",
    0x100: "display clocks",
}


def snapshot(device: torch.device) -> dict[str, Any]:
    """Return the state of the machine at this moment. It never raises.

    A field that cannot be read is None, and `unknown` has the reason under the field's name.
    """
    host, unknown = _read(HOST_FIELDS, "host")
    gpu = None
    try:
        fields = gpu_fields(device)
    except Exception as error:
        unknown["gpu"] = _reason(error)
    else:
        gpu, reasons = _read(fields, "gpu")
        unknown |= reasons
    return {"unix_time_s": time.time(), "host": host, "gpu": gpu, "unknown": unknown}


def disturbances(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a line for each condition that may have disturbed a measurement between two snapshots."""
    lines = []
    host = before["host"]
    others = other_cores(host["cpu_times"], after["host"]["cpu_times"])
    if others is not None and others >= OTHER_CORES:
        lines.append(f"other processes used {others:.1f} of {host['cpus']} CPU cores")
    if host["governor"] not in (None, "performance"):
        lines.append(f"the CPU's frequency governor is {host['governor']}")
    if gpu := after["gpu"]:
        throttled_ns = _grown((before["gpu"] or {}).get("throttled_ns") or {}, gpu.get("throttled_ns") or {})
        if throttled_ns:
            by = ", ".join(f"{reason} {ns / 1e9:.1f} s" for reason, ns in throttled_ns.items())
            lines.append(f"the GPU was throttled during the measurement: {by}")
        if others := gpu["other_processes"]:
            lines.append(f"{len(others)} other process(es) used the GPU")
        if reasons := [reason for reason in gpu["throttled"] or () if reason != "idle"]:
            lines.append(f"the GPU was throttled at the end: {', '.join(reasons)}")
    return lines


def _grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Return the increase of each counter that is in both and has grown."""
    return {name: n - before[name] for name, n in after.items() if n > before.get(name, n)}


# ---- the CPU time of other processes -------------------------------------------------------------------------

OTHER_CORES = 0.25  # of other processes; less is the system's own work


def cpu_times() -> dict[str, float]:
    """Return the CPU seconds that this run's processes and all processes have used, and the time.

    The run's processes are this one and its descendants; under torchrun, its siblings and theirs too. "all" counts the
    CPUs that this process may use. Raise OSError where the system has no /proc.
    """
    per_s = os.sysconf("SC_CLK_TCK")
    allowed = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    busy = 0
    for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines():
        name, *ticks = line.split()
        if name in allowed:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            busy += user + nice + system + irq + softirq + steal
    times: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            times[pid := int(file.parent.name)] = sum(map(int, fields[11:15]))  # with those of children that ended
            children.setdefault(int(fields[1]), []).append(pid)
    own, waiting = 0, [os.getppid() if ranks.local_world_size() > 1 else os.getpid()]
    while waiting:
        own += times.get(pid := waiting.pop(), 0)
        waiting += children.get(pid, [])
    return {"unix_time_s": time.time(), "own_s": own / per_s, "all_s": busy / per_s}


def other_cores(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> float | None:
    """Return the mean number of cores that other processes used between two cpu_times, or None if one is None."""
    if before is None or after is None:
        return None
    other_s, seconds = ((after[key] - before[key]) for key in ("all_s", "unix_time_s"))
    other_s -= after["own_s"] - before["own_s"]
    return max(0.0, other_s / seconds) if seconds > 0 else 0.0


class OtherLoad:
    """Finds out, while a run trains, that other processes take the cores that its threads need.

    Args:
        threads: the number of threads of each of this host's processes of the run.
    """

    LEAST_S = 2.0  # between two readings, because CPU times advance in steps of 10 ms
    LEAST_CORES = 0.5  # fewer cores slow a run by less than its speed varies anyway

    def __init__(self, threads: int) -> None:
        self.threads, self.processes = threads, ranks.local_world_size()
        self.times = _cpu_times_or_none()
        self.best = 0.0  # images/s
        self.said = False

    def line(self, images_per_s: float) -> str | None:
        """Return a line with the remedy, at most once, if other processes have slowed the run since the last reading.

        Args:
            images_per_s: the run's speed since the last call.
        """
        self.best = max(self.best, images_per_s)
        if self.said or self.times is None or time.time() - self.times["unix_time_s"] < self.LEAST_S:
            return None
        before, self.times = self.times, _cpu_times_or_none()
        others = other_cores(before, self.times) or 0.0
        cpus = len(os.sched_getaffinity(0))
        if others < self.LEAST_CORES or others + self.threads * self.processes <= cpus + OTHER_CORES:
            return None
        self.said = True
        fits = max(1, int(cpus - others) // self.processes)
        remedy = f"end them, or start with OMP_NUM_THREADS={fits}" if fits < self.threads else "end them"
        speed = f"{images_per_s:,.0f} images/s" + (f" ({self.best:,.0f} before)" if self.best > images_per_s else "")
        return f"other processes use {others:.1f} of the {cpus} CPU cores and slow this run: {speed}; {remedy}"


def _cpu_times_or_none() -> dict[str, float] | None:
    try:
        return cpu_times()
    except Exception:
        return None


CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def _mhz() -> list[float]:
    """Return the frequency of each CPU. Raise LookupError if the system does not report any."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    if not found:
        raise LookupError("/proc/cpuinfo has no frequencies")
    return found


HOST_FIELDS: dict[str, Callable[[], Any]] = {
    "cpus": lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "load_average": lambda: list(os.getloadavg()),  # over 1, 5 and 15 minutes
    "cpu_times": cpu_times,
    "mhz": _mhz,  # of each CPU
    "governor": lambda: (CPUFREQ / "scaling_governor").read_text(encoding="utf-8").strip(),
}


def gpu_fields(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return a function for each field of a GPU's state that reads it through NVML.

    Raises:
        LookupError: if the device is no GPU or nvidia-ml-py is not installed.
    """
    if device.type != "cuda":
        raise LookupError(f"the device is {device}")
    try:
        nvml = importlib.import_module("pynvml")  # the package nvidia-ml-py
    except ImportError:
        raise LookupError("nvidia-ml-py is not installed: pip install nvidia-ml-py") from None
    nvml.nvmlInit()
    # Look the GPU up by its UUID, because CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's.
    gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def throttled() -> list[str]:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
        return [reason for bit, reason in THROTTLE_REASONS.items() if bits & bit]

    def throttled_ns() -> dict[str, int]:
        """Return the throttled time since the driver was loaded; throttled() sees one moment, mostly an idle GPU."""
        policies = {"power cap": nvml.NVML_PERF_POLICY_POWER, "temperature": nvml.NVML_PERF_POLICY_THERMAL}
        return {
            reason: nvml.nvmlDeviceGetViolationStatus(gpu, policy).violationTime for reason, policy in policies.items()
        }

    def other_processes() -> list[dict[str, Any]]:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        return [{"pid": p.pid, "bytes": p.usedGpuMemory} for p in running if p.pid != os.getpid()]

    return {
        "name": lambda: nvml.nvmlDeviceGetName(gpu),
        "driver": nvml.nvmlSystemGetDriverVersion,
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "sm_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
        "throttled": throttled,
        "throttled_ns": throttled_ns,
        "other_processes": other_processes,
    }


def _read(fields: Mapping[str, Callable[[], Any]], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the value of each field, and the reason for each one that cannot be read."""
    values: dict[str, Any] = dict.fromkeys(fields)
    unknown = {}
    for name, read in fields.items():
        try:
            values[name] = read()
        except Exception as error:
            unknown[f"{where}.{name}"] = _reason(error)
    return values, unknown


def _reason(error: Exception) -> str:
    """Return the error's first line, or its type if its text fails."""
    text = type(error).__name__
    with suppress(Exception):  # an error's own text may fail too
        text = first_line(error)
    return text
