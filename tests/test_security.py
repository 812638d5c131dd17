"""docs/security.md as tests: third-party files run nothing and reach nothing outside their place.

Related tests: checkpoints and weights in tests/test_fuzz.py; CIFAR's pickles, PostScript under an image's name and
links in data folders in tests/test_sources.py.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastres.config.cli import parse
from fastres.data.sources.download import MOST_BYTES, extract
from fastres.utils.errors import UsageError
from tests.fixtures import rejected

PLAIN = [  # ways to ask jsonargparse for a class
    "model: {{name: resnet18, options: {{stem: {{class_path: {0}}}}}}}",
    "model: {{name: resnet18, options: {{stem: '{{class_path: {0}}}'}}}}",
    "model: {{name: resnet18, options: '{{stem: {{class_path: {0}}}}}'}}",
    "model: {{name: resnet18, options: {{stem: [{{class_path: {0}}}]}}}}",
    "model: {{name: resnet18, options: {{norm_layer: {0}}}}}",
    "model: {{options: {{class_path: {0}, init_args: {{}}}}}}",
    "model: {{class_path: {0}}}",
    "data: {{class_path: {0}, init_args: {{}}}}",
    "optim: {{lr: {{class_path: {0}}}}}",
    "schedule: {{milestones: [{{class_path: {0}}}]}}",
    "optim: {{lr: !!python/object/apply:{0} []}}",
]


@pytest.mark.parametrize("text", PLAIN)
def test_a_configuration_file_imports_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text("class Thing: pass\n")
    (tmp_path / "config.yaml").write_text(text.format("planted.Thing"))
    with pytest.raises(UsageError):
        parse(["--config", str(tmp_path / "config.yaml")])
    assert "planted" not in sys.modules


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


NAME = "cifar/test_batch"
HOSTILE: dict[str, Callable[[Path], list[tarfile.TarInfo]]] = {
    "above": lambda outside: [member("cifar/../../escaped")],
    "absolute": lambda outside: [member(str(outside / "escaped"))],
    "a link": lambda outside: [member(NAME, tarfile.SYMTYPE, linkname=str(outside / "secret"))],
    "a hard link": lambda outside: [member(NAME, tarfile.LNKTYPE, linkname=str(outside / "secret"))],
    "through a link": lambda outside: [
        member("cifar", tarfile.SYMTYPE, linkname=str(outside)),
        member("cifar/escaped"),
    ],
    "a device": lambda outside: [member(NAME, tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "a pipe": lambda outside: [member(NAME, tarfile.FIFOTYPE)],
    "a folder": lambda outside: [member(NAME, tarfile.DIRTYPE)],
    "huge": lambda outside: [member(NAME, size=MOST_BYTES + 1)],
    "cut short": lambda outside: [member(NAME, size=1 << 20)],
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("packing", ["", "gz"])
def test_an_archive_writes_nothing_but_the_files_asked_for(kind: str, packing: str, tmp_path: Path) -> None:
    outside, archive, folder = tmp_path / "outside", tmp_path / "a.tar", tmp_path / "data" / "cifar"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    with tarfile.open(archive, f"w:{packing}") as tar:  # type: ignore[call-overload]
        for info in HOSTILE[kind](outside):
            tar.fileobj.write(info.tobuf())  # only the header, because addfile() would require the bytes
            tar.offset += tarfile.BLOCKSIZE
    with rejected(archive, folder):
        extract(archive, hashlib.md5(archive.read_bytes()).hexdigest(), folder, ["test_batch"])
    assert list(folder.iterdir()) == [] and (outside / "secret").read_text() == "secret"
    assert {path.name for path in tmp_path.rglob("*")} == {"outside", "secret", "a.tar", "data", "cifar"}


def test_unrequested_members_stay_in_the_archive(tmp_path: Path) -> None:
    archive, folder = tmp_path / "a.tar", tmp_path / "cifar"
    with tarfile.open(archive, "w") as tar:
        for name in ("cifar/test_batch", "cifar/other", "../escaped", "elsewhere/x"):
            tar.addfile(member(name, size=4), io.BytesIO(b"data"))
    extract(archive, hashlib.md5(archive.read_bytes()).hexdigest(), folder, ["test_batch"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "cifar", "test_batch"]
    assert (folder / "test_batch").read_bytes() == b"data"


def test_no_module_reads_pickles_or_yaml_that_may_run_something() -> None:
    import fastres

    for path in Path(fastres.__file__).parent.rglob("*.py"):
        source = path.read_text()
        assert source.count("torch.load(") == source.count("weights_only=True)"), path
        assert source.count("np.load(") == source.count("allow_pickle=False)"), path
        for call in ("pickle.load", "yaml.load(", "yaml.unsafe_load", "yaml.full_load", "allow_pickle=True"):
            assert call not in source, (path, call)
