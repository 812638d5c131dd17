"""Any file or flag is read, or rejected in one line; nothing is executed, and nothing is overwritten.

FASTRES_FUZZ=N in the environment generates N times as many examples, and different ones each time. CI always generates
the same ones.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from rich.console import Console
from torch import Tensor, nn

from fastres import evaluate, plot, train
from fastres.config import recipes
from fastres.config.cli import parse
from fastres.config.files import recipe_names
from fastres.config.schema import FIELDS, SECTIONS, Config, DataConfig, dump, to_dict
from fastres.config.tutorial import TUTORIAL_KEYS
from fastres.data.sources.cache import kept_images, sizes_and_reasons
from fastres.models.registry import build_model
from fastres.models.weights import load_weights
from fastres.runs import checkpoint
from fastres.runs.history import HISTORY, PANELS, read_history, read_metrics
from fastres.runs.loading import read_run, rebuild
from fastres.runs.run_dir import RunDir
from fastres.training.metrics import Metrics
from fastres.utils.errors import RunError, UsageError, run_command
from tests.fixtures import Creates, engine, write_image_folder

TIMES = int(os.environ.get("FASTRES_FUZZ", "1"))
T = TypeVar("T")


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test of `data` that many times."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return settings(
            max_examples=examples * TIMES,
            derandomize=TIMES == 1,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(given(data=st.data())(test))

    return decorate


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Change to an empty folder, which has to stay empty."""
    folder = tmp_path_factory.mktemp("here")
    with contextlib.chdir(folder):
        yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def outcome(work: Callable[[], T]) -> T | None:
    """Return the result of `work`, or None if it failed with one printable line."""
    raised: Exception | None = None
    status: object = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return work()
    except (UsageError, RunError) as error:
        raised = error
    except SystemExit as left:
        status = left.code
    if raised is None:
        assert status == 0  # --help
        return None

    def raises() -> int:
        raise raised

    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        run_command(raises)
    line = said.getvalue()
    assert line.startswith("fastres: error: ") and line.endswith("\n") and line[:-1].isprintable(), line
    assert "Traceback" not in line
    return None


# ---- what may be drawn --------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers().filter(lambda n: not 99 < n <= 10_000),  # building a network of that many blocks takes a minute
    st.sampled_from([0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400]),
    st.floats(),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=12),
    st.sampled_from(["auto", "null", "nan", "1e400", "*a", "&a", "resnet8", "[1, 2]", "{a: 1}", "\ud800", "cuda:0"]),
)  # fmt: skip
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
YAML_ONLY = st.dates() | st.binary(max_size=4) | st.sets(st.integers(0, 3), max_size=2)
SNIPPETS = ["&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system [touch x]", "!!binary aGk=", "{", "]", ": ", "- ",
            "\t", "\n", "\x00", "\x1b[2J", "\u2028", "\ufeff", "9" * 5_000, "[" * 2_000, "2001-01-01", "null", ".nan",
            "class_path: os.system", "\ud800"]  # fmt: skip


def mutated(data: DataObject, whole: bytes) -> bytes:
    """Return damaged bytes: cut, flipped, moved, replaced, or entirely different."""
    changed, size = bytearray(whole), max(len(whole) - 1, 0)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, size))
        match data.draw(st.sampled_from(["cut", "flip", "insert", "replace", "remove", "other"])):
            case "cut":
                del changed[place:]
            case "flip" if place < len(changed):
                changed[place] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                snippet = data.draw(st.binary(max_size=20) | st.sampled_from(SNIPPETS).map(encoded))
                changed[place:place] = snippet
            case "replace":
                snippet = data.draw(st.binary(max_size=20))
                changed[place : place + len(snippet)] = snippet
            case "remove":
                del changed[place : place + data.draw(st.integers(1, 50))]
            case "other":
                changed[:] = data.draw(st.binary(max_size=40) | st.sampled_from(SNIPPETS).map(encoded))
    return bytes(changed)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# ---- configuration ------------------------------------------------------------------------------------------


def read_config(argv: list[str], file: Path) -> None:
    """Parse the flags. An accepted configuration has to survive its own file."""
    config = outcome(lambda: parse(argv))
    if config is not None:
        file.write_text(dump(config), encoding="utf-8")
        assert to_dict(parse(["--config", str(file)])) == to_dict(config)


OPTIONS = ["blocks_per_stage", "stem", "v1", "groups", "width_per_group", "plain", "norm", "norm_layer", "num_classes",
           "in_channels", "fused_convolutions", "zero_init_residual", "replace_stride_with_dilation"]  # fmt: skip


def nested(data: DataObject) -> dict[Any, Any]:
    """Return a configuration of mostly known fields and mostly wrong values."""
    keys = st.text(max_size=6) | st.integers() | st.dates() | st.none() | st.sampled_from(["class_path", "__path__"])
    values = JSON | YAML_ONLY
    content: dict[Any, Any] = {}
    for _ in range(data.draw(st.integers(0, 3))):
        field = data.draw(st.sampled_from([*FIELDS, "model.options", "model.options"]))
        section, name = field.split(".")
        value = data.draw(values | st.dictionaries(st.sampled_from(OPTIONS), values, min_size=1, max_size=2))
        content.setdefault(section, {})[name] = value
    match data.draw(st.integers(0, 5)):
        case 0:
            content[data.draw(keys | st.sampled_from(SECTIONS))] = data.draw(values)
        case 1:
            content.setdefault(data.draw(st.sampled_from(SECTIONS)), {})[data.draw(keys)] = data.draw(values)
        case 2:
            content = {data.draw(st.sampled_from(TUTORIAL_KEYS)): data.draw(values), **content}
        case 3:
            content["recipe"] = data.draw(st.sampled_from(recipe_names()) | values)
    return content


@fuzz(100)
def test_a_configuration_of_any_values_is_read_or_refused(data: DataObject, scratch: Path) -> None:
    content, file = nested(data), scratch / "config.yaml"
    try:
        text = data.draw(st.sampled_from([yaml.safe_dump, json.dumps]))(content)
    except (TypeError, ValueError, yaml.YAMLError):  # a date in JSON
        text = yaml.safe_dump(content)
    file.write_bytes(encoded(text))
    read_config(["--config", str(file)], scratch / "again.yaml")


@fuzz(40)
def test_a_damaged_recipe_is_read_or_refused(data: DataObject, scratch: Path) -> None:
    name, file = data.draw(st.sampled_from(recipe_names())), scratch / "config.yaml"
    recipe = Path(recipes.__path__[0]) / f"{name}.yaml"
    file.write_bytes(mutated(data, recipe.read_bytes()))
    read_config(["--config", str(file)], scratch / "again.yaml")


@pytest.mark.parametrize("examples", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_flags_of_any_kind_are_read_or_refused(examples: int, scratch: Path) -> None:
    @fuzz(examples)
    def check(data: DataObject) -> None:
        names = st.sampled_from([*FIELDS, *SECTIONS, *(f"model.options.{name}" for name in OPTIONS), "recipe"])
        values = JSON.map(json.dumps) | st.text(max_size=10) | st.sampled_from(SNIPPETS) | LEAVES.map(str)
        flags = st.builds(lambda name, value: [f"--{name}={value}"], names, values)
        flags |= st.builds(lambda name, value: [f"--{name}", value], names | st.text(max_size=6), values)
        flags |= st.lists(values, max_size=1)
        argv = [word.replace("\x00", "") for flag in data.draw(st.lists(flags, max_size=3)) for word in flag]
        # Flags that print something and exit are left out.
        read_config([word for word in argv if not word.startswith("--print_")], scratch / "again.yaml")

    check()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "model: &a {options: *a}",
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(12)),
        "model: {name: " + "[" * 5_000,
        "optim: {lr: 1" + "0" * 400 + "}",
        "train: {steps: 1" + "0" * 5_000 + "}",
        "train: {steps: 1" + "0" * 40 + "}",
        "model: {name: cifar_resnet, options: {blocks_per_stage: 1000000000}}",
        "model: {name: resnet600002}",
        "num_layer: 1000000000",
        "model: {num_classes: 1" + "0" * 30 + "}",
        "model: {options: {num_classes: 4}}",
        "2001-01-01: 3",
        "{height: 3, 1: 2, z: 3}",
        'model: {name: "\\x1b[2J"}',
    ],
)
def test_inputs_that_the_fuzz_has_found_are_refused(text: str, scratch: Path) -> None:
    (scratch / "config.yaml").write_text(text)
    assert outcome(lambda: parse(["--config", str(scratch / "config.yaml")])) is None


# ---- checkpoints --------------------------------------------------------------------------------------------


def a_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_model("resnet8").state_dict()
    return {"step": 3, "trainer": {"model": {key: model[key] for key in ("conv1.weight", "fc.weight", "fc.bias")}}}


@pytest.fixture(scope="module")
def saved(scratch: Path) -> bytes:
    path = checkpoint.save(scratch / "saved", 3, a_state(), keep=1)
    return path.read_bytes()


def read_checkpoint(path: Path, content: bytes) -> Any:
    """Load the checkpoint by itself and as the newest of a folder; neither may change anything."""
    folder = path.parent
    path.write_bytes(content)
    before = sorted(folder.iterdir())
    state = outcome(lambda: checkpoint.load(path))
    assert (outcome(lambda: checkpoint.latest(folder)) is None) == (state is None)
    assert sorted(folder.iterdir()) == before and path.read_bytes() == content
    return state


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints/step-00000003.pt"


@fuzz(120)
def test_a_damaged_checkpoint_is_read_or_refused(data: DataObject, saved: bytes, place: Path) -> None:
    state = read_checkpoint(place, mutated(data, saved))
    assert state is None or checkpoint.digest(state) == checkpoint.digest(a_state())


def rezipped(whole: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """Return the archive that torch.save wrote, still valid, with other content."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return packed.getvalue()


@fuzz(50)
def test_a_valid_archive_of_other_content_is_read_or_refused(data: DataObject, saved: bytes, place: Path) -> None:
    victim = data.draw(st.sampled_from(zipfile.ZipFile(io.BytesIO(saved)).namelist()))
    content = rezipped(saved, lambda name, old: mutated(data, old) if name == victim else old)
    state = read_checkpoint(place, content)
    assert state is None or checkpoint.digest(state) == checkpoint.digest(a_state())


TENSORS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "of no memory": lambda: torch.empty(3, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "expanded": lambda: torch.ones(1).expand(5, 3),
    "of a number": lambda: torch.tensor(1.0),
    "empty": lambda: torch.ones(0, 3),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
}
CONTENTS = st.recursive(
    LEAVES | st.sampled_from(sorted(TENSORS)).map(lambda name: TENSORS[name]()),
    lambda inner: st.lists(inner, max_size=2)
    | st.tuples(inner)
    | st.dictionaries(st.sampled_from(["step", "trainer", "model", "conv1.weight", "fc.weight", 0]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.mark.parametrize("examples", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_a_forged_checkpoint_is_read_or_refused(examples: int, place: Path, run: Path) -> None:
    @fuzz(examples)
    def check(data: DataObject) -> None:
        state: Any = data.draw(CONTENTS)
        if data.draw(st.booleans()):
            state = {
                "step": data.draw(NUMBERS | st.just(3)),
                "trainer": data.draw(CONTENTS | st.just({"model": state})),
            }
        checksum: Any = "0" * 64
        with contextlib.suppress(Exception):
            checksum = checkpoint.digest(state)
        packed = io.BytesIO()
        with contextlib.suppress(Exception):  # torch need not read what it cannot write
            torch.save({"state": state, "sha256": checksum}, packed)
        if read_checkpoint(place, packed.getvalue()) is not None:
            found = outcome(lambda: read_run(run, place))
            if found is not None:
                outcome(lambda: rebuild(*found))

    check()


@pytest.mark.parametrize("trainer", [None, 3, [], {}, {"model": 3}, {"model": {}}, {"model": {"fc.weight": 3}}])
def test_a_run_refuses_to_resume_a_forged_checkpoint(trainer: Any, place: Path) -> None:
    times, window = {"train_time_s": 0.0, "wall_time_s": 0.0}, {"loss": 0.0, "correct": 0, "samples": 0}
    state = {"step": 1, "trainer": trainer, "window": window, "clock": times}
    checkpoint.save(place.parent, 3, state, keep=1)
    run = place.parent.parent / "run"
    assert outcome(lambda: train.main([*TINY, "--run.resume", str(place), "--run.dir", str(run)])) is None
    assert not run.exists()


FORBIDDEN = {
    "reduce": lambda witness: pickle.dumps({"state": Creates(witness), "sha256": ""}, 2),
    "reduce, protocol 4": lambda witness: pickle.dumps({"state": Creates(witness), "sha256": ""}, 4),
    "as a key": lambda witness: pickle.dumps({Creates(witness): 1}, 2),
    "text": lambda witness: b"cio\nopen\n(V" + str(witness).encode() + b"\nVw\ntR.",
    "an instance": lambda witness: b"(V" + str(witness).encode() + b"\nVw\niio\nopen\n.",
    "os.system": lambda witness: b"cos\nsystem\n(V touch " + str(witness).encode() + b"\ntR.",
    "eval": lambda witness: b"cbuiltins\neval\n(Vopen(" + repr(str(witness)).encode() + b', "w")\ntR.',
    "torch's own": lambda witness: b"ctorch.serialization\nload\n(V" + str(witness).encode() + b"\ntR.",
}


@pytest.mark.parametrize("kind", FORBIDDEN)
@pytest.mark.parametrize("place_in", ["archive", "alone", "weights"])
def test_no_pickle_runs_what_it_names(kind: str, place_in: str, saved: bytes, place: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    payload = FORBIDDEN[kind](witness)
    if kind.startswith("reduce"):
        pickle.loads(payload)["state"].close()
        assert witness.exists()  # a plain load would execute it
        witness.unlink()
    packed = rezipped(saved, lambda name, old: payload if name.endswith("data.pkl") else old)
    if place_in == "weights":
        path = tmp_path / "weights.pth"
        for content in (packed, payload):
            path.write_bytes(content)
            assert outcome(lambda: load_weights(build_model("resnet8"), path)) is None
    else:
        assert read_checkpoint(place, packed if place_in == "archive" else payload) is None
    assert not witness.exists()


# ---- weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("resnet8")


def read_weights(model: nn.Module, path: Path) -> None:
    """Load the weights. If they are rejected, the model has to be unchanged."""
    before = copy.deepcopy(model.state_dict())
    if outcome(lambda: load_weights(model, path)) is None:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.load_state_dict(before)


@fuzz(120)
def test_a_damaged_safetensors_file_is_read_or_refused(data: DataObject, model: nn.Module, scratch: Path) -> None:
    whole, path = safetensors.torch.save(model.state_dict()), scratch / "model.safetensors"
    length = int.from_bytes(whole[:8], "little")
    header, tensors = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(header)) | st.text(max_size=4))
        field = st.sampled_from(["dtype", "shape", "data_offsets"])
        dtypes = st.sampled_from(["F8_E8M0", "F4", "I64", "BOOL", "C64"])
        header[key] = {**header.get(key, {}), data.draw(field): data.draw(JSON | dtypes | st.lists(NUMBERS))}
        text = encoded(json.dumps(header))
    else:
        text = mutated(data, json.dumps(header).encode())
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
    read_weights(model, path)


@fuzz(50)
def test_a_state_dict_of_anything_is_read_or_refused(data: DataObject, model: nn.Module, scratch: Path) -> None:
    state: dict[Any, Any] = dict(model.state_dict())
    tensors = st.sampled_from(sorted(TENSORS)).map(lambda name: TENSORS[name]())
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(["fc.weight", "fc.bias", "conv1.weight", "model", 0, None, "x"]))
        state[key] = data.draw(tensors | CONTENTS)
    torch.save(data.draw(st.sampled_from([state, {"model": state}, {"state_dict": [state]}])), scratch / "model.pt")
    read_weights(model, scratch / "model.pt")


# ---- the folder of a run ------------------------------------------------------------------------------------

TINY = ("--recipe digits --model.name resnet8 --train.steps 2 --train.eval_every 1 --train.log_every 1 "
        "--train.batch_size 16 --schedule.warmup_steps 0 --engine.precision fp32").split()  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main([*TINY, "--run.dir", str(folder)]) == 0
    return folder


@lru_cache
def config_of(folder: Path) -> Config:
    return parse([*TINY, "--run.dir", str(folder)])


def altered(data: DataObject, name: str, whole: bytes) -> bytes:
    """Return a file of a run, damaged or with values of another kind."""
    if name == "model.safetensors" or data.draw(st.booleans()):
        return mutated(data, whole)
    values = JSON | NUMBERS
    if name == "config.yaml":
        content = yaml.safe_load(whole)
        content[data.draw(st.sampled_from([*SECTIONS, "recipe"]))] = data.draw(values)
        return encoded(json.dumps(content))
    if name == "history.csv":
        rows = list(csv.reader(io.StringIO(whole.decode())))
        row = data.draw(st.integers(0, len(rows) - 1))
        rows[row][data.draw(st.integers(0, len(HISTORY) - 1))] = str(data.draw(LEAVES))
        table = io.StringIO()
        csv.writer(table).writerows(rows)
        return encoded(table.getvalue())
    lines = whole.decode().splitlines() if name == "metrics.jsonl" else [whole.decode()]
    line = data.draw(st.integers(0, len(lines) - 1))
    content = json.loads(lines[line])
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(values)
    lines[line] = json.dumps(content if data.draw(st.booleans()) else data.draw(values))
    return encoded("\n".join(lines))


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@fuzz(50)
def test_a_damaged_run_is_read_or_refused_and_left_alone(data: DataObject, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, dirs_exist_ok=True)
    name = data.draw(
        st.sampled_from(["config.yaml", "summary.json", "metrics.jsonl", "history.csv", "model.safetensors"])
    )
    (folder / name).write_bytes(altered(data, name, (run / name).read_bytes()))
    before = files_of(folder)
    summary = outcome(lambda: RunDir(config_of(folder)).check_resumable())
    assert summary is None or f"{summary['test_accuracy']:.4f}"
    if name in ("config.yaml", "model.safetensors"):
        found = outcome(lambda: read_run(folder))
        if found is not None:
            outcome(lambda: rebuild(*found))
    rows = read_metrics(folder / "metrics.jsonl")
    assert json.dumps(rows)
    history = outcome(lambda: read_history(folder))
    assert history is None or all(row[column] is not None for row in history for column, _ in PANELS)
    Console(file=io.StringIO()).print(plot.table_of([folder]))
    if name == "summary.json":
        outcome(lambda: evaluate.agreement(Metrics(), folder / name))
    assert files_of(folder) == before


@fuzz(8)
def test_a_run_with_damaged_metrics_continues(data: DataObject, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, dirs_exist_ok=True)
    (folder / "summary.json").unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(altered(data, "metrics.jsonl", (run / "metrics.jsonl").read_bytes()))
    kept = read_metrics(metrics)
    again = RunDir(config_of(folder))
    again.begin(engine(), 2)
    assert json.dumps(read_metrics(metrics)) == json.dumps([row for row in kept if row["step"] <= 2])
    outcome(again.write_history)


@fuzz(6)
def test_plot_draws_a_damaged_history_or_refuses_it(data: DataObject, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, dirs_exist_ok=True)
    (folder / "history.csv").write_bytes(altered(data, "history.csv", (run / "history.csv").read_bytes()))
    outcome(lambda: plot.main([str(folder), "--output", str(tmp_path / "picture.png")]))


# ---- the cache of decoded images ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(scratch: Path) -> Path:
    return write_image_folder(scratch / "photographs", size=8) / "train"


@fuzz(100)
def test_a_damaged_cache_is_rebuilt(data: DataObject, photographs: Path, scratch: Path) -> None:
    paths, store = sorted(photographs.rglob("*.jpg")), scratch / "store"
    config = DataConfig(source="imagefolder", cache=str(store), workers=1)
    # A damaged file that nothing reads would stay. The next example would then start from it, and its draws would
    # depend on earlier examples.
    shutil.rmtree(store, ignore_errors=True)

    def read() -> tuple[bytes, Any]:
        images, _ = kept_images(photographs, "train", paths, config)
        assert images is not None and images.shape == (len(paths), 8, 8, 3)
        return np.asarray(images).tobytes(), sizes_and_reasons(photographs, "train", paths, config)[0]

    wanted = read()
    path = data.draw(st.sampled_from(sorted(path for path in store.iterdir() if path.suffix != ".lock")))
    if path.suffix != ".npy" and data.draw(st.booleans()):
        content = json.loads(path.read_text())
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSON | st.lists(NUMBERS, max_size=4))
        path.write_bytes(encoded(json.dumps(content)))
    else:
        path.write_bytes(mutated(data, path.read_bytes()))
    assert read() == wanted
