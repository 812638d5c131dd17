"""Fuse BatchNorm + ReLU (+ add) of a torchvision network, and compare its speed with the original's, step by step."""

import statistics
import sys
import time

import torch
import torch.nn.functional as F
import torchvision

import fastres

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 9
device = "cuda" if torch.cuda.is_available() else "cpu"
images = torch.randn(16, 3, 96, 96, device=device).to(memory_format=torch.channels_last)
labels = torch.randint(1000, (16,), device=device)


def a_model() -> torch.nn.Module:
    """Return a ResNet-18 in channels-last order."""
    return torchvision.models.resnet18().to(device, memory_format=torch.channels_last)


def seconds_of_a_step(model: torch.nn.Module) -> float:
    """Return the time of forward, loss and backward in bf16."""
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16):
        F.cross_entropy(model(images), labels).backward()
    return time.perf_counter() - start if device == "cpu" else (torch.cuda.synchronize() or time.perf_counter() - start)


plain, fused = a_model(), fastres.fuse(a_model())
print(fastres.fusion_report(fused))
times = [(seconds_of_a_step(plain), seconds_of_a_step(fused)) for _ in range(ROUNDS + 1)][1:]  # the first warms up
print(f"fused trains at {statistics.median(a / b for a, b in times):.2f} times the speed (n = {ROUNDS}, interleaved)")
