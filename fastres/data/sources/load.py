"""The data sets by name. To add one, write a function from DataConfig to Source and add a line to SOURCES."""

from __future__ import annotations

from collections.abc import Callable

from fastres.config.schema import DataConfig
from fastres.data.sources.builtin import digits, synthetic
from fastres.data.sources.imagefolder import imagefolder
from fastres.data.sources.source import Source
from fastres.data.sources.torchvision_sets import cifar10, cifar100, fashion_mnist, mnist
from fastres.utils.errors import UsageError


def _arrays(config: DataConfig) -> Source:
    """Reject the source of a run whose data was given in Python."""
    raise UsageError("data.source arrays: this data is given in Python, to fastres.fit; choose another --data.source")


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "digits": digits,
    "imagefolder": imagefolder,
    "synthetic": synthetic,
    "arrays": _arrays,
}


def load_source(config: DataConfig) -> Source:
    """Return the data set that `config` names, downloaded if need be, and checked.

    Args:
        config: the section `data` of a configuration: source, root, download, mirror, ….

    Raises:
        UsageError: if the data set is damaged or unavailable.
    """
    try:
        return SOURCES[config.source](config)
    except OSError as error:
        raise UsageError(f"cannot read {config.source} under --data.root {config.root}: {error}") from error
