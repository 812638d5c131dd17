"""Benchmarks as lines of text: the tables on the terminal after a run, and the tables of RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from bench.lib.stats import Info, is_identical, merge_seeds, reaches_goal

SHOWN_KERNELS = 25  # in the table; the JSON has all


@dataclass(frozen=True)
class Row:
    """A benchmark that has run."""

    fullname: str  # bench/FILE::FUNCTION[CASE]
    info: Info  # its extra_info; empty if it failed

    @property
    def file(self) -> str:
        return Path(self.fullname.partition("::")[0]).name

    @property
    def case(self) -> str:
        name = self.fullname.partition("[")[2].rstrip("]")
        return f"{name} with AVX2" if "::bench_avx2[" in self.fullname else name


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the title, the explanation and the lines of each table that has lines."""
    for file, (title, explanation, lines) in TABLES.items():
        if of_file := [row for row in rows if row.file == file and row.info]:
            yield title, explanation, lines(of_file)


def consumer_rate(info: Info) -> tuple[float, float]:
    """Return a network's images/s, and the loader's multiple of it. Older results have other names."""
    if "appetite_images_per_s" in info:
        return info["appetite_images_per_s"], info["times_appetite"]
    return info["consumer_images_per_s"], info["times_consumer_rate"]


def rate(info: Info, digits: int = 0) -> str:
    """Return images/s with the 20 and 80 % quantiles, in columns."""
    low, high = info["images_per_s_20_80"]
    return f"{info['images_per_s']:>9,.{digits}f} images/s ({low:,.{digits}f} to {high:,.{digits}f})"


def _spread(sd: float | None, digits: int) -> str:
    return "" if sd is None else f" ± {sd:,.{digits}f}"


def _ratio_line(row: Row) -> str:
    info = row.info
    baseline = f"{info['ratio']:.2f} x the baseline's {info['baseline_images_per_s']:,.0f}, n={info['n']}"
    return f"{row.case:<34} {rate(info)}  {baseline}"


def _throughput(row: Row) -> list[str]:
    info = row.info
    cost = f"{info['gflop_per_s']:,.0f} GFLOP/s"
    if info["share_of_peak"] is not None:
        cost += f", {info['share_of_peak']:.0%} of the peak"
    if info.get("share_of_product") is not None:
        cost += f", {info['share_of_product']:.0%} of a matrix product's rate"
    if info["peak_memory_bytes"] is not None:
        cost += f", {info['peak_memory_bytes'] / 1e9:.2f} GB of memory"
    return [f"{_ratio_line(row)}; {cost}"]


def _loader(row: Row) -> list[str]:
    takes, times = consumer_rate(row.info)
    return [f"{_ratio_line(row)}; {times:.1f} x the {takes:,.0f} that {row.info['model']} trains on"]


def _schedule(row: Row) -> list[str]:
    info = row.info
    if info["what"] == "graphed":
        graphed, ungraphed = (info["train_time_s"][name] for name in ("true", "false"))
        differ = f"differ from step {info['first_different_step']} on"
        found = "equal, every bit" if is_identical(info) else differ
        return [
            f"graphed and ungraphed in {info['precision']}, deterministic: {info['losses']} losses and the weights "
            f"after {info['steps']:,} steps {found}; {graphed:.2f} s and {ungraphed:.2f} s"
        ]
    lines = []
    for name, (images_per_s, low, high) in info["images_per_s"].items():
        ratio = info["times_as_fast"].get(name)
        lines.append(
            f"{name:<36} {images_per_s:>9,.0f} images/s ({low:,.0f} to {high:,.0f})"
            + (f"; fastres {ratio:.2f} x" if ratio else f", {info['model']} in {info['precision']}")
            + f", n={info['n']} rounds of {info['steps']:,} steps"
        )
    return lines


def accuracy_lines(rows: Sequence[Row]) -> list[str]:
    """Return the lines of bench_accuracy.py, in which the seeds of a run are merged."""
    lines = []
    for info in merge_seeds([row.info for row in rows]):
        time = f"{info['mean_train_time_s']:,.1f}{_spread(info['sd_train_time_s'], 1)} s"
        run = f"{info['steps']:,} steps in {info['precision']} on {info['data']}, n={info['n']}"
        ours = f"{info['mean_accuracy']['fastres']:.4f}"
        if info["what"] == "model":
            he = "" if info["he_et_al"] is None else f" (He et al. {info['he_et_al']:.4f})"
            lines.append(f"{info['case']:<22} {ours}{_spread(info['sd_accuracy'], 4)}{he}, {time} for {run}")
            continue
        lines.append(f"{info['model']:<22} {ours}, {time} for {run}")
        if info["n_plain"]:
            error = _spread(info["standard_error"], 4)
            against = f"difference {info['difference']:+.4f}{error} (standard error)"
            plain = f"{info['mean_accuracy']['plain']:.4f}, n={info['n_plain']}"
            twin = "" if info["plain_is"] == "the loop" else f", as its {info['plain_is']}"
            lines.append(f"  plain loop in fp32{twin}: {plain}; {against}")
        if proof := info["twin"]:
            equal = "are the loop's, every bit" if is_identical(proof) else "are NOT the loop's"
            lines.append(f"  the twin's {proof['steps']} losses and its weights after them {equal}")
    return lines


def _time_to_90(row: Row) -> list[str]:
    info = row.info
    p = "a single run" if info["p_value"] is None else f"p = {info['p_value']:.2g}"
    return [
        f"{info['contest']:<10} {info['kind']}  {info['mean_s']:8.2f}{_spread(info['sd_s'], 2)} s for "
        f"{info['steps']:,} steps in {info['precision']}: accuracy {info['mean_accuracy']:.4f}, {info['misses']} of "
        f"{info['n']} runs below 90 %, {p}" + ("" if reaches_goal(info["p_value"]) else "; 90 % is not shown")
    ]


def peer_lines(row: Row) -> list[str]:
    """Return the line of a benchmark of bench_peers.py."""
    info = row.info
    if info["peer"] == "airbench":
        runs = (
            f"{name} {info[name]['mean_s']:.3f} s{_spread(info[name]['sd_s'], 3)} to {info[name]['mean_accuracy']:.4f}"
            for name in ("fastres", "airbench")
        )
        too_short = "" if info["peer_averages_90"] else ", which is too short"
        cut = f"cut to {info['epochs']} epochs{too_short}, on {info['data']}, n={info['n']}"
        return [f"{'airbench':<28} {', '.join(runs)}, {cut}"]
    peer = info["peer"] + (", fed by DALI" if info.get("feed") == "dali" else "")
    ratio = f"{info['ratio']:.2f} x the peer's {info['baseline_images_per_s']:,.1f}, n={info['n']}"
    return [f"{peer:<28} fastres {rate(info, 1).lstrip()}  {ratio}"]


def _scaling(row: Row) -> list[str]:
    info, lines = row.info, []
    if info["sweep"] == "cost":
        low, high = info["ratio_20_80"]
        cost = f"{info['ratio']:.3f} x the time of a step without it ({low:.3f} to {high:.3f}), n={info['n']}"
        return [f"{info['what']}: {cost}"]
    for i, (size, rate) in enumerate(zip(info["sizes"], info["images_per_s"], strict=True)):
        if info["sweep"] == "processes":
            cost = f"{info['ratio'][i]:.2f} x one process, {info['n']} runs each"
        else:
            low, high = info["step_s_20_80"][i]
            cost = f"{1e3 * info['step_s'][i]:9.2f} ms a step ({1e3 * low:.2f} to {1e3 * high:.2f}), n={info['n']}"
        lines.append(f"{info['sweep']:<10} {size:>5}  {rate:>9,.0f} images/s  {cost}")
    if info["sweep"] != "processes":
        slope = f"{1e3 * info['slope_s']:.4f} ms × {info['sweep']}"
        lines.append(f"  fitted line: {1e3 * info['fixed_s']:.2f} ms + {slope}")
    return lines


def _kernel_times(row: Row) -> list[str]:
    info = row.info
    low, high = info["step_us_20_80"]
    lines = [
        f"{info['model']} at batch {info['batch']} in {info['precision']}, norm {info['norm']}: "
        f"{info['step_us']:,.1f} us a step ({low:,.1f} to {high:,.1f}), n={info['n']}",
        f"  traced: {info['kernels']:,.1f} kernels, busy {info['busy_us']:,.1f} us, {info['gaps']:,.1f} gaps of "
        f"{info['gaps_us']:,.1f} us together; a mean of {info['traced_steps']} steps",
    ]
    for kernel in info["by_kernel"][:SHOWN_KERNELS]:
        share, calls = kernel["us"] / info["busy_us"], kernel["calls"]
        lines.append(f"  {kernel['us']:>8,.1f} us {share:>4.0%} {calls:>6,.1f} x  {kernel['name'][:70]}")
    if rest := info["by_kernel"][SHOWN_KERNELS:]:
        total = sum(kernel["us"] for kernel in rest)
        lines.append(f"  {total:>8,.1f} us       in {len(rest)} more kernels")
    return lines


def _compile(row: Row) -> list[str]:
    info = row.info
    ratio = f"{info['ratio']:.3f} x the default's {info['baseline_images_per_s']:,.0f}, n={info['n']}"
    name = f"{info['model']} {info['settings']:<36}"
    return [f"{name} {rate(info)}  {ratio}; first step {info['first_s']:.0f} s"]


def kernel_lines(rows: Sequence[Row]) -> list[str]:
    """Return the lines of bench_kernels.py, by case in the order of the rows."""
    infos = [row.info for row in rows]
    first = infos[0]
    lines = [f"{first['device']}: a copy moves {first['copy_gb_per_s']:,.0f} GB/s"]
    if first["capability"] is None:
        lines = [f"{first['device']} has no Triton: 'reference' is the plain PyTorch version of the kernels, no claim"]
    for case, of_case in groupby(infos, lambda info: (info["what"], tuple(info["shape"]), info["dtype"])):
        what, shape, dtype = case
        lines.append(f"{what}, {' × '.join(map(str, shape))} in {dtype}")
        lines += [f"  {_kernel_line(info)}" for info in of_case]
    missing = dict.fromkeys(reason for info in infos for reason in info["absent"].items())
    return lines + [f"no {variant}: {reason}" for variant, reason in missing]


def _kernel_line(info: Info) -> str:
    how = f"{info['direction']}, {info['mode']}"
    spread = "({:,.1f} to {:,.1f})".format(*info["us_20_80"])
    text = (
        f"{how:<15} {info['variant']:<11} {info['median_us']:>9,.1f} us {spread:<22} "
        f"{info['ratio']:>5.2f} x {info['baseline']}'s {info['baseline_median_us']:,.1f}, n={info['n']}"
    )
    if info["gb_per_s"] is not None:
        text += f", {info['gb_per_s']:,.0f} GB/s, {info['share_of_copy']:.0%} of a copy's"
    return text


Lines = Callable[[Sequence[Row]], list[str]]


def _each(lines_of: Callable[[Row], list[str]]) -> Lines:
    return lambda rows: [line for row in rows for line in lines_of(row)]


# By file: the title of its table, what it compares, and its benchmarks as lines.
TABLES: dict[str, tuple[str, str, Lines]] = {
    "bench_throughput.py": (
        "images/s against the plain loop",
        "fastres and the plain loop (eager, fp32, NCHW) take turns on one fixed batch. Ratio: fastres's images/s / the "
        "plain loop's; more is better. 'default' has every setting at its default. 'against tuned': the loop is tuned "
        "by hand (bf16, channels-last, fused SGD; compiled on a GPU). 'against norm torch': fastres itself, with "
        "model.norm torch.",
        _each(_throughput),
    ),
    "bench_schedule.py": (
        "images/s of the schedule, with its data",
        "Training steps with their batches, in turns with the plain loop. More is better.",
        _each(_schedule),
    ),
    "bench_accuracy.py": (
        "accuracy at the last step",
        "Test accuracy of whole runs, beside runs of the plain loop; their difference should be about 0.",
        accuracy_lines,
    ),
    "bench_time_to_90.py": (
        "time of runs that reach 90 %",
        "Seconds of whole runs, short ones that should end at 90 % or more; less is better. cold: with the start of "
        "the process and all compilation; warm: training and the final evaluation only. p: one-sided t-test that the "
        "mean accuracy is not above 90 %.",
        _each(_time_to_90),
    ),
    "bench_peers.py": (
        "images/s against peers",
        "Training ResNet-50, in turns with the peer. Ratio: fastres's images/s / the peer's; more is better.",
        _each(peer_lines),
    ),
    "bench_fuse.py": (
        "images/s after fastres.fuse",
        "A network after fastres.fuse, in turns with the same network before it, in the same loop. More is better.",
        _each(lambda row: [_ratio_line(row)]),
    ),
    "bench_scaling.py": (
        "cost of a step",
        "Time of a ResNet step by batch size, depth and number of processes (less is better), and the cost of DDP and "
        "of deterministic algorithms (1.00 is free).",
        _each(_scaling),
    ),
    "bench_loaders.py": (
        "images/s of the loaders",
        "Each loader alone, in turns with torch's DataLoader as the baseline; more is better. Above 1 x the network's "
        "rate, the loader does not limit training.",
        _each(_loader),
    ),
    "bench_kernel_times.py": ("a step's kernels and gaps", "From a trace of whole steps.", _each(_kernel_times)),
    "bench_compile.py": (
        "images/s under inductor's settings",
        "Training, in turns with the default settings. More is better.",
        _each(_compile),
    ),
    "bench_kernels.py": (
        "time per call",
        "In us, in turns with the baseline; less is better. Ratio: the baseline's time / the variant's, so more is "
        "better. plain: without a CUDA graph; full: forward and backward.",
        kernel_lines,
    ),
}
