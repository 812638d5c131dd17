"""The result of an evaluation by class, as lines, tables and a picture."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastres.runs.classes import accuracy_lines, output_names, write_classes
from fastres.training.metrics import Evaluation


def evaluation(confusion: list[list[int]], in_top: int | None = None) -> Evaluation:
    counts = np.array(confusion)
    return Evaluation(1.0, int(counts.trace()), int(counts.sum()), counts, in_top)


def test_a_few_classes_are_all_named_and_of_many_the_lowest() -> None:
    assert accuracy_lines(evaluation([[9, 1], [0, 10]]), ["ant", "bee"]) == [
        "accuracy by class: ant (0.9000), bee (1.0000)"
    ]
    many = np.diag([10] * 12)
    many[3, 4], many[7, 0] = 10, 30
    many[5, 5] = 0  # a class without a sample
    assert accuracy_lines(evaluation(many.tolist(), 120), [f"c{i}" for i in range(12)]) == [
        "top-5 accuracy 0.8000",
        "lowest accuracies of 11 classes: c7 (0.2500), c3 (0.5000), c0 (1.0000)",
    ]


def test_the_tables_have_every_class_and_its_most_frequent_mistake(tmp_path: Path) -> None:
    write_classes(evaluation([[7, 1, 2], [0, 4, 0], [0, 0, 0]]), ["ant", 'bee, "wild"', "output 2"], tmp_path, "net")
    tables = [list(csv.reader((tmp_path / name).open())) for name in ("classes.csv", "confusion.csv")]
    assert tables[0] == [
        ["class", "samples", "correct", "accuracy", "most_often_taken_for"],
        ["ant", "10", "7", "0.700000", "output 2"],
        ['bee, "wild"', "4", "4", "1.000000", ""],
        ["output 2", "0", "0", "", ""],
    ]
    assert tables[1] == [
        ["class \\ predicted", "ant", 'bee, "wild"', "output 2"],
        ["ant", "7", "1", "2"],
        ['bee, "wild"', "0", "4", "0"],
        ["output 2", "0", "0", "0"],
    ]
    assert output_names(["ant", "bee"], 3) == ["ant", "bee", "output 2"]


@pytest.mark.parametrize(
    "names",
    [
        ["$x_{", "犬" * 200, "two\nlines\ttab", "\udcff is no UTF-8"],
        [f"class {i}" for i in range(30)],
        [str(i) for i in range(150)],
    ],
    ids=len,
)
def test_any_names_and_numbers_of_classes_are_drawn_without_a_warning(tmp_path: Path, names: list[str]) -> None:
    counts = np.diag([20] * len(names))
    counts[0, 1] = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_classes(evaluation(counts.tolist()), names, tmp_path, "net")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 500
    assert all((tmp_path / name).read_text("utf-8") for name in ("classes.csv", "confusion.csv"))
