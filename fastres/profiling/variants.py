"""Variants: the ways in which the engine can run a network or a block, by name. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product

from fastres.config.schema import Config, EngineConfig, ModelConfig
from fastres.utils.errors import UsageError
from fastres.utils.suggest import unknown

AXES: dict[str, tuple[str, ...]] = {  # the first word of each is the plain choice, which a short name leaves out
    "mode": ("eager", "compile", "graph"),
    "norm": ("torch", "fused", "apex"),
    "layout": ("nchw", "channels_last"),
    "precision": ("fp32", "tf32", "bf16", "fp16"),
}
DEFAULTS = {  # by device; the first is the baseline
    "cpu": ("eager-nchw-fp32", "eager-channels_last-fp32", "eager-fused-channels_last-fp32", "eager-channels_last-bf16",
            "compile-channels_last-bf16", "eager-fused-channels_last-bf16"),
    "cuda": ("eager-nchw-fp32", "eager-channels_last-fp32", "eager-channels_last-bf16", "compile-channels_last-bf16",
             "eager-fused-channels_last-bf16", "compile-fused-channels_last-bf16", "graph-fused-channels_last-bf16"),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way to run a workload: a word of each axis."""

    mode: str
    norm: str
    layout: str
    precision: str

    @property
    def words(self) -> tuple[str, ...]:
        """Return the words in the order of AXES."""
        return (self.mode, self.norm, self.layout, self.precision)

    @property
    def name(self) -> str:
        """Return the words joined by -, without torch's norm: compile-channels_last-bf16."""
        return "-".join(word for word in self.words if word != "torch")

    def config(self, model: ModelConfig, device: str) -> Config:
        """Return the configuration of a run that trains in this variant."""
        return Config(
            model=replace(model, norm=self.norm),  # type: ignore[arg-type]
            engine=EngineConfig(
                device=device,
                precision=self.precision,  # type: ignore[arg-type]
                channels_last=self.layout == "channels_last",
                compile=self.mode != "eager",
                conv="auto" if self.norm == "fused" else "torch",
                cuda_graph=self.mode == "graph",
            ),
        )


ALL = tuple(Variant(*words) for words in product(*AXES.values()))
REFERENCE = ALL[0]


def variants_named(names: Sequence[str]) -> list[Variant]:
    """Return the variants with these names, each once.

    A name has its words in any order and may leave out the first word of an axis. NAME+fuse is NAME-fused, which is
    fastres.fuse for a network of another package. A pattern with * matches over all full names.

    Raises:
        UsageError: if a name has an unknown word or two words of one axis, or a pattern matches nothing.
    """
    found: list[Variant] = []
    for name in names:
        if "*" in name:
            matching = [v for v in ALL if fnmatchcase(v.name, name) or fnmatchcase("-".join(v.words), name)]
            if not matching:
                raise UsageError(f"--variants {name}: no variant matches; names read like {ALL[-1].name}")
            found += matching
            continue
        chosen = {axis: words[0] for axis, words in AXES.items()}
        given: dict[str, str] = {}
        for word in name.replace("+fuse", "-fused").split("-"):
            axis = next((axis for axis, words in AXES.items() if word in words), None)
            if axis is None:
                words = [word for words in AXES.values() for word in words]
                raise UsageError(f"--variants {name}: {unknown('word', word, words)}")
            if axis in given:
                raise UsageError(f"--variants {name}: {given[axis]} and {word} are both a {axis}; leave out one")
            given[axis] = chosen[axis] = word
        found.append(Variant(**chosen))
    return list(dict.fromkeys(found))
