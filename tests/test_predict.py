"""fastres/predict.py: classes by name and probabilities, for images of any size and kind, from runs and exports."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastres import export, predict, train
from fastres.config.schema import DataConfig
from fastres.data.augment import resize_and_center_crop
from fastres.data.sources.builtin import digits
from fastres.runs.loading import load_description
from fastres.runs.predicting import load_run
from tests.commands import run_fastres
from tests.fixtures import rejected, write_image_folder, write_turned

QUICK = (
    "--model.name resnet8 --train.steps 20 --train.batch_size 8 --train.eval_every 20 --schedule.name constant "
    "--schedule.warmup_steps 0 --optim.lr 0.02 --engine.precision fp32"
).split()
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of images of three colours, 32 pixels wide."""
    return write_image_folder(tmp_path_factory.mktemp("photos"), classes=CLASSES, train=8, test=4, suffix=".png")


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    data = ["--data.source", "imagefolder", "--data.root", str(photos)]
    assert train.main([*QUICK, *data, "--run.dir", str(folder)]) == 0
    return folder


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_runs_data_json_has_what_a_prediction_needs(run: Path, photos: Path) -> None:
    described = json.loads((run / "data.json").read_text())
    assert described["classes"] == list(CLASSES) and described["image_size"] == 32 and described["channels"] == 3
    assert described["mean"] == [0.485, 0.456, 0.406] and described["std"] == [0.229, 0.224, 0.225]
    assert described["samples"] == {"train": 24, "validation": 0, "test": 12}
    assert str(photos) not in (run / "data.json").read_text()


def test_predictions_of_the_test_set_have_the_accuracy_of_its_evaluation(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    done = run_fastres("predict", run, photos / "test", "--csv", tmp_path / "rows.csv")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = rows(done.stdout)
    assert [row["file"] for row in found] == sorted(str(path) for path in (photos / "test").rglob("*.png"))
    right = sum(row["class"] == Path(row["file"]).parent.name for row in found)
    assert right / len(found) == json.loads((run / "summary.json").read_text())["test_accuracy"]
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in found)
    assert (tmp_path / "rows.csv").read_text() == done.stdout


def test_top_k_gives_the_most_probable_classes_first(run: Path, photos: Path) -> None:
    done = run_fastres("predict", run, photos / "test" / "ant", "--top", "9", "--json")
    found = json.loads(done.stdout)
    assert len(found) == 4 * 3 and {row["class"] for row in found[:3]} == set(CLASSES)
    probabilities = [row["probability"] for row in found[:3]]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_an_exported_file_predicts_as_its_run(run: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    format_ = {".pt2": "torch_export"}.get(suffix, suffix[1:])
    file = tmp_path / f"export{suffix}"
    export.main([str(run), "--format", format_, "--output", str(file)])
    images = sorted((photos / "test").rglob("*.png"))
    ours, theirs = load_run(run, flags=["--engine.device=cpu"]), load_run(file)
    assert theirs.data == ours.data == load_description(run)
    batch = [ours.prepare(np.array(Image.open(path))) for path in images]
    assert theirs.probabilities(batch) == pytest.approx(ours.probabilities(batch), abs=1e-5)
    card = json.loads((tmp_path / "config.json").read_text())
    assert card["architecture"] == "resnet8" and card["label_names"] == list(CLASSES) and card["num_classes"] == 3
    assert card["pretrained_cfg"]["input_size"] == [3, 32, 32] and card["pretrained_cfg"]["mean"] == [
        0.485,
        0.456,
        0.406,
    ]


def test_an_export_does_not_replace_anothers_config_json(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with rejected("config.json exists and is not from an export"):
        export.main([str(run), "--output", str(tmp_path / "export.safetensors")])
    assert (tmp_path / "config.json").read_text() == '{"mine": 1}' and not (tmp_path / "export.safetensors").exists()


def test_images_of_any_size_and_kind_are_predicted(run: Path, photos: Path, tmp_path: Path) -> None:
    """Each is the same colour, so each has the class of the original."""
    original = Image.open(next((photos / "train" / "bee").glob("*.png")))
    colour = Image.new("RGB", (90, 60), tuple(int(x) for x in np.array(original).mean((0, 1))))
    kinds = {
        "large.png": colour.resize((640, 480)),
        "small.png": colour.resize((7, 9)),
        "alpha.png": colour.convert("RGBA"),
        "palette.gif": colour.quantize(16),
        "cmyk.jpg": colour.convert("CMYK"),
        "photo.webp": colour,
        "scan.tif": colour,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    done = run_fastres("predict", run, *(tmp_path / name for name in kinds))
    assert done.returncode == 0, done.stderr
    assert {row["class"] for row in rows(done.stdout)} == {"bee"} and len(rows(done.stdout)) == len(kinds)


def test_grey_networks_take_coloured_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = ["--train.steps", "60", "--train.batch_size", "32", "--schedule.warmup_steps", "10"]
    assert train.main(["--recipe", "digits", "--model.name", "resnet8", *steps, "--run.dir", str(folder)]) == 0
    source = digits(DataConfig())
    predictor = load_run(folder, flags=["--engine.device=cpu"])
    grey = [source.test.image(i) for i in range(60)]
    coloured = [predictor.prepare(np.repeat(image, 3, axis=2)) for image in grey]
    assert np.array_equal(np.stack(coloured), np.stack(grey))
    right = predictor.probabilities(coloured).argmax(1) == source.test.labels[:60]
    assert right.mean() > 0.6


def test_a_larger_image_is_resized_to_its_shorter_side_and_cut_in_the_middle(run: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    prepared = load_run(run, flags=["--engine.device=cpu"]).prepare(image)
    wide = np.array(Image.fromarray(image).resize((64, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(prepared, wide[:, 16:48])
    assert np.array_equal(prepared, resize_and_center_crop(image, 32, zoom=1.0))


def test_a_file_that_cannot_be_read_is_one_line(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = next((photos / "test" / "cat").glob("*.png"))
    done = run_fastres("predict", run, tmp_path / "broken.png", good)
    assert done.returncode == 1
    assert done.stderr.startswith("fastres: error: cannot read the image ") and done.stderr.count("\n") == 1
    assert [row["file"] for row in rows(done.stdout)] == [str(good)]


def test_what_is_no_run_and_no_image_is_rejected(run: Path, tmp_path: Path) -> None:
    for arguments, names in (
        ((tmp_path, run), ("is not the folder of a run",)),
        ((run / "config.yaml", run), ("neither the folder of a run nor an exported",)),
        ((run, tmp_path / "missing.png"), ("missing.png: does not exist",)),
        ((run, tmp_path), ("has no image files",)),
    ):
        done = run_fastres("predict", *arguments)
        assert done.returncode == 2 and not [name for name in names if name not in done.stderr], done.stderr


# ---- a run knows its data -----------------------------------------------------------------------------------


def copy_of(photos: Path, place: Path) -> Path:
    return Path(shutil.copytree(photos, place))


def test_evaluate_matches_classes_by_name(run: Path, photos: Path, tmp_path: Path) -> None:
    """If the class ant is missing, bee and cat would take other places and be counted wrong."""
    fewer = copy_of(photos, tmp_path / "fewer")
    for part in ("train", "test"):
        shutil.rmtree(fewer / part / "ant")
    done = run_fastres("evaluate", run, "--data.root", fewer)
    assert done.returncode == 0, done.stderr
    found = rows(run_fastres("predict", run, fewer / "test").stdout)
    right = sum(row["class"] == Path(row["file"]).parent.name for row in found) / len(found)
    assert f"test accuracy {right:.4f}" in done.stdout
    for part in ("train", "test"):
        (fewer / part / "bee").rename(fewer / part / "wasp")
    done = run_fastres("evaluate", run, "--data.root", fewer)
    assert done.returncode == 2 and "without wasp" in done.stderr and done.stderr.count("\n") == 1


def rename_a_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "ant").rename(root / part / "zebra")


def add_an_image(root: Path) -> None:
    source = next((root / "train" / "cat").glob("*.png"))
    shutil.copy(source, source.with_name("added.png"))


def rename_a_file(root: Path) -> None:
    source = next((root / "train" / "cat").glob("*.png"))
    source.rename(source.with_name("renamed.png"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_a_class, "the classes are bee, cat, zebra, and were ant, bee, cat"),
        (add_an_image, "train has 25 images, and had 24"),
        (rename_a_file, "files have other names or sizes"),
    ],
)
def test_a_resumed_run_rejects_data_that_changed(photos: Path, tmp_path: Path, change: object, said: str) -> None:
    root = copy_of(photos, tmp_path / "data")
    flags = [*QUICK, "--data.source", "imagefolder", "--data.root", str(root), "--run.checkpoint_every", "5"]
    run = tmp_path / "run"
    assert train.main([*flags, "--run.dir", str(run)]) == 0
    (run / "summary.json").unlink()  # as if it had been stopped before its end
    change(root)  # type: ignore[operator]
    with rejected("the data has changed since the checkpoint of step 20", said, "--model.weights"):
        train.main([*flags, "--run.dir", str(run)])


# EXIF --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upright_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with data.exif and stop after the checkpoint of the last step."""
    folder = tmp_path_factory.mktemp("upright") / "run"
    flags = [*QUICK, "--train.steps", "2", "--data.source", "imagefolder", "--data.root", str(photos)]
    assert train.main([*flags, "--data.exif", "true", "--run.dir", str(folder)]) == 0
    return folder


def probabilities(capsys: pytest.CaptureFixture[str], model: Path, *files: Path) -> list[str]:
    capsys.readouterr()
    assert predict.main([str(model), *map(str, files), "--engine.device", "cpu"]) == 0
    return [row["class"] + row["probability"] for row in rows(capsys.readouterr().out)]


@pytest.mark.parametrize("exported", [False, True])
def test_a_turned_photo_is_predicted_as_the_upright_one(
    upright_run: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], exported: bool
) -> None:
    ramp = np.linspace(0, 255, 40, dtype=np.uint8)
    photo = Image.fromarray(
        np.stack([np.tile(ramp, (64, 1)), np.zeros((64, 40), np.uint8), np.eye(64, 40) * 255], 2).astype(np.uint8)
    )
    photo.save(tmp_path / "upright.png")
    turned = [write_turned(tmp_path / f"{number}.png", photo, number) for number in range(2, 9)]
    models = {"upright": upright_run, "as stored": run}
    if exported:
        models = {name: tmp_path / f"{name}.safetensors" for name in models}
        for name, folder in (("upright", upright_run), ("as stored", run)):
            export.main([str(folder), "--output", str(models[name])])
            (tmp_path / "config.json").unlink()
    first, *others = probabilities(capsys, models["upright"], tmp_path / "upright.png", *turned)
    assert others == [first] * 7
    first, *others = probabilities(capsys, models["as stored"], tmp_path / "upright.png", *turned)
    assert first not in others


def test_a_run_that_turns_images_is_not_resumed_by_one_that_does_not(
    upright_run: Path, run: Path, photos: Path, tmp_path: Path
) -> None:
    data = ["--data.source", "imagefolder", "--data.root", str(photos)]
    for folder, steps, value, other in ((upright_run, "2", "False", "True"), (run, "20", "True", "False")):
        again = [*QUICK, "--train.steps", steps, *data, "--data.exif", value.lower()]
        copy = shutil.copytree(folder, tmp_path / f"exif {value}")
        (copy / "summary.json").unlink()  # as if it had been stopped before its end
        with rejected(f"data.exif: {other} -> {value}".lower()):
            train.main([*again, "--run.dir", str(copy)])
        (checkpoint,) = (copy / "checkpoints").glob("step-*.pt")
        with rejected(f"the data has changed since the checkpoint of step {steps}: exif is {value}, and was {other};"):
            train.main([*again, "--run.dir", str(tmp_path / f"new {value}"), "--run.resume", str(checkpoint)])


def test_a_description_of_an_earlier_version_has_no_exif_and_means_false(upright_run: Path, tmp_path: Path) -> None:
    described = json.loads((upright_run / "data.json").read_text())
    assert described["exif"] is True and load_description(upright_run).exif is True
    (tmp_path / "data.json").write_text(json.dumps(described | {"exif": "no"}))
    with rejected(tmp_path / "data.json", "does not describe the data of a run"):
        load_description(tmp_path)
    del described["exif"]
    (tmp_path / "data.json").write_text(json.dumps(described))
    assert load_description(tmp_path).exif is False
