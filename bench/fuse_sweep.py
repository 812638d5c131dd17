"""Fuse the classification networks of torchvision and timm, and compare each with the original in float64.

    python -m bench.fuse_sweep --output sweep.jsonl                          all networks that are not in the file yet
    python -m bench.fuse_sweep --output sweep.jsonl --only 'timm/*resnet*' --limit 20
    python -m bench.fuse_sweep --output sweep.jsonl --summary                the results in the file
    python -m bench.fuse_sweep --output families.jsonl --thorough --only 'torchvision/resnet18'

A network is taken if it has a BatchNorm2d and a ReLU, and at most 100 million parameters. It gets random weights and
two images of the smallest size that it takes. A line of the file has the number of norms that are fused, the largest
relative error of logits, gradients and statistics in training and eval mode, and whether a copy, a pickle and
torch.compile (fullgraph, aot_eager) compute the same. With --thorough also inductor, torch.export, ONNX and
DistributedDataParallel on two processes have to. timm is not a dependency: pip install timm.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import multiprocessing
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from fastres.models.fuse import fuse, fusion_report, unfuse
from fastres.utils.errors import Parser, run_command

MOST_PARAMETERS = 100_000_000
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384, 448)  # pixels
TOLERANCE = 1e-8  # relative
MISSED = ("not understood", "more than once", "hooks", "may be", "random numbers", "replaced")  # in a norm's reason

Values = dict[str, list[Tensor]]


def builders() -> dict[str, Callable[[], nn.Module]]:
    """Return a function for every network, by library and name."""
    import torchvision

    found: dict[str, Callable[[], nn.Module]] = {
        f"torchvision/{name}": partial(torchvision.models.get_model, name, weights=None)
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    with suppress(ImportError):
        import timm

        found |= {f"timm/{name}": partial(timm.create_model, name) for name in timm.list_models()}
    return found


def reason_to_skip(model: nn.Module) -> str:
    """Return the reason why the network is not compared, or an empty text."""
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        return "more than 100 million parameters"
    kinds = [type(module) for module in model.modules()]
    if not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds):
        return "no BatchNorm2d"
    others = any(kind in kinds for kind in (nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU))  # else ReLU is a function
    return "no ReLU" if others and nn.ReLU not in kinds else ""


# ---- one network -------------------------------------------------------------------------------------------


def values_of(model: nn.Module, images: Tensor, training: bool) -> Values:
    """Run forward and backward; return logits, gradients and statistics. Random numbers are the same in every run."""
    model.train(training).zero_grad()
    torch.manual_seed(1)
    images = images.clone().requires_grad_()
    logits = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]
    loss = torch.stack([(y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum() for y in logits])
    torch.autograd.backward(loss.sum())
    parameters = [p.grad for p in model.parameters() if p.grad is not None]
    gradients = [*([] if images.grad is None else [images.grad]), *parameters]
    return {
        "logits": [y.detach() for y in logits],
        "gradients": gradients,
        "statistics": [buffer.clone() for buffer in model.buffers()],
    }


def errors(expected: Values, got: Values) -> dict[str, float]:
    """Return the largest relative error of each kind of values; the norm is that of each tensor."""
    return {
        kind: max(
            (float((a - b).norm() / a.norm().clamp(min=1e-30)) if a.is_floating_point() else float((a != b).any()))
            for a, b in zip(expected[kind], got[kind], strict=True)
        )
        for kind in expected
        if expected[kind]
    }


def smallest_images(model: nn.Module) -> Tensor:
    """Return two images of the smallest size that the network takes in training."""
    for size in SIZES:
        images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with suppress(Exception), torch.no_grad():
            copy.deepcopy(model).train()(images)
            return images
    raise ValueError("takes no images of the sizes that were tried")


def compare(build: Callable[[], nn.Module], thorough: bool = False) -> dict[str, Any]:
    """Fuse one network and return the line of results."""
    with suppress(NotImplementedError), torch.device("meta"):  # without its weights, which take most of the time
        if why := reason_to_skip(build()):
            return {"skipped": why}
    torch.manual_seed(0)
    model = build()
    if why := reason_to_skip(model):
        return {"skipped": why}
    model = model.double()
    images = smallest_images(model)
    fused = copy.deepcopy(model)
    start = time.perf_counter()
    fuse(fused)
    # Copied before they compute, because some networks store results in themselves, which cannot be copied.
    twins = {"deepcopy": copy.deepcopy(fused), "pickle": pickle.loads(pickle.dumps(fused))}
    result: dict[str, Any] = {"size": images.shape[-1], "fuse_s": round(time.perf_counter() - start, 2)}
    report = fusion_report(fused)
    result |= {"norms": len(report.fused) + len(report.left), "fused": len(report.fused)}
    result["reasons"] = sorted(set(report.left.values()))
    for mode, training in (("train", True), ("eval", False)):
        result[mode] = errors(values_of(model, images, training), values_of(fused, images, training))
    for name, twin in twins.items():
        same = [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
        twin.load_state_dict(fused.state_dict())  # the statistics that the training pass moved
        result[name] = same and max(errors(values_of(fused, images, False), values_of(twin, images, False)).values())
    result["compile"] = compiled(fused, images)
    if isinstance(result["compile"], str):
        result["compile_original"] = compiled(model, images)
    if thorough:
        result |= {name: largest_error(model, fused, images) for name, largest_error in THOROUGH.items()}
    unfused = unfuse(fused)
    result["unfused"] = [type(m) for m in unfused.modules()] == [type(m) for m in model.modules()]
    return result


def compiled(model: nn.Module, images: Tensor) -> float | str:
    """Return the largest error of the compiled network's logits in eval mode, or the error in words."""
    torch._dynamo.reset()
    try:
        twin: Any = torch.compile(copy.deepcopy(model).eval(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():  # a backward would take three times as long to compile
            expected, got = (
                [y for y in tree_leaves(net(images)) if isinstance(y, Tensor)] for net in (model.eval(), twin)
            )
        return errors({"logits": expected}, {"logits": got})["logits"]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


# ---- what --thorough adds: the largest relative error of a fused network against the original -----------------


def under_inductor(model: nn.Module, fused: nn.Module, images: Tensor) -> float:
    """Compare logits, gradients and statistics of training, both networks under inductor, which has errors too."""
    expected, got = (_inductor_values(network, images) for network in (model, fused))
    return max(errors(expected, got).values())


def _inductor_values(model: nn.Module, images: Tensor) -> Values:
    torch._dynamo.reset()
    twin: Any = torch.compile(copy.deepcopy(model), fullgraph=True)
    return values_of(twin, images, True)


def exported(model: nn.Module, fused: nn.Module, images: Tensor) -> float:
    """Compare the logits of a program of torch.export."""
    program = torch.export.export(fused.eval(), (images,))
    with torch.no_grad():
        return errors({"logits": [model.eval()(images)]}, {"logits": [program.module()(images)]})["logits"]


def in_onnx(model: nn.Module, fused: nn.Module, images: Tensor) -> float:
    """Compare the logits of an ONNX file in float32."""
    import onnxruntime

    images, twin = images.float(), copy.deepcopy(fused).float().eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.onnx.export(twin, (images,), Path(folder) / "net.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(Path(folder) / "net.onnx")
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        expected = copy.deepcopy(model).float().eval()(images)
    return errors({"logits": [expected]}, {"logits": [torch.from_numpy(logits)]})["logits"]


def under_ddp(model: nn.Module, fused: nn.Module, images: Tensor) -> float:
    """Compare the training of two processes, each with images of its own."""
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def work(rank: int, folder: str) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        own = images.roll(rank, -1) * (1 + rank)
        expected, got = (values_of(DistributedDataParallel(net), own, True) for net in (model, fused))
        found.put(max(errors(expected, got).values()))

    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=work, args=(rank, folder)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError("a rank failed")
    return float(max(found.get() for _ in ranks))


THOROUGH = {"inductor": under_inductor, "export": exported, "onnx": in_onnx, "ddp": under_ddp}


# ---- all networks ------------------------------------------------------------------------------------------


def in_process(name: str, build: Callable[[], nn.Module], thorough: bool, timeout_s: float) -> dict[str, Any]:
    """Return compare's result from a process of its own, or the reason why there is none."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            sender.send(compare(build, thorough))
        except Exception as error:
            sender.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})

    process = context.Process(target=work)
    process.start()
    sender.close()
    result = {"failed": f"no result within {timeout_s:.0f} s"}
    if receiver.poll(timeout_s):
        with suppress(EOFError):
            result = receiver.recv()
    process.kill()
    process.join()
    return {"name": name, **result}


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def verdict(result: dict[str, Any]) -> str:
    """Return the class of a result for the summary.

    A network is fused wholly if no norm was left out that a ReLU may follow: every other one is followed by something
    else, or its addition is fused with another norm.
    """
    if "skipped" in result:
        return "skipped"
    if "failed" in result:
        return "failed"
    worst = max(max(result[mode].values()) for mode in ("train", "eval"))
    copies = all(result[name] is not False and result[name] <= TOLERANCE for name in ("deepcopy", "pickle"))
    compiles = isinstance(result["compile"], float) or isinstance(result.get("compile_original"), str)
    if not (worst <= TOLERANCE and copies and compiles and result["unfused"]):
        return "wrong"
    if not result["fused"]:
        return "not at all"
    return "in parts" if any(part in why for why in result["reasons"] for part in MISSED) else "wholly"


def summary(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines: the number of networks by verdict, the largest errors, and what went wrong."""
    by_verdict: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_verdict.setdefault(verdict(result), []).append(result)
    yield ", ".join(f"{len(group)} {name}" for name, group in sorted(by_verdict.items()))
    compared = [result for result in results if "train" in result]
    for mode in ("train", "eval"):
        for kind in ("logits", "gradients", "statistics"):
            worst = max(compared, key=lambda one: one[mode].get(kind, 0), default=None)
            if worst is not None:
                yield f"largest error of {kind} in {mode} mode: {worst[mode].get(kind, 0):.1e} ({worst['name']})"
    norms, fused = (sum(result[key] for result in compared) for key in ("norms", "fused"))
    yield f"{fused} of {norms} norms in {len(compared)} networks"
    for name in ("inductor", "export", "onnx", "ddp"):
        if values := {result["name"]: result[name] for result in compared if name in result}:
            yield f"{name}: {', '.join(f'{net} {error:.1e}' for net, error in values.items())}"
    for name in ("failed", "wrong"):
        for result in by_verdict.get(name, []):
            yield f"{name}: {json.dumps(result)}"


def main() -> None:
    parser = Parser(
        prog="python -m bench.fuse_sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="File of JSON lines; its networks are not repeated.")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="Names such as 'timm/resnet*', in order.")
    parser.add_argument("--limit", type=int, help="Largest number of networks.")
    parser.add_argument("--timeout", type=float, default=300, help="Seconds for one network.")
    help_ = "Also compare inductor, torch.export, ONNX and DistributedDataParallel, which takes minutes for a network."
    parser.add_argument("--thorough", action="store_true", help=help_)
    parser.add_argument("--summary", action="store_true", help="Print the results in the file, and stop.")
    options = parser.parse_args()
    if not options.summary:
        importlib.import_module("torch._dynamo")  # once, before the processes are forked
        done, known = {result["name"] for result in read(options.output)}, builders()
        wanted = [name for pattern in options.only or ["*"] for name in known if fnmatch(name, pattern)]
        chosen = {name: known[name] for name in wanted if name not in done}
        for name, build in list(chosen.items())[: options.limit]:
            result = in_process(name, build, options.thorough, options.timeout)
            with options.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{name}: {verdict(result)}", flush=True)
    print(*summary(read(options.output)), sep="\n")


if __name__ == "__main__":
    run_command(main)
