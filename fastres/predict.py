"""`fastres predict RUN FILES...`: predict the classes of images with a run or an exported file.

It prints the columns file, class and probability, with as many rows for each file as --top says. A file that cannot be
read is one line on standard error; the others are predicted, and the exit status is 1.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

# These packages import their modules, and torch, when one of their names is used: after the command line is parsed.
from fastres import data, runs
from fastres.utils.atomic_io import json_of, write_text
from fastres.utils.errors import Parser, UsageError, complain, positive, run_command, user_path

if TYPE_CHECKING:
    from fastres.runs.predicting import Predictor

COLUMNS = ("file", "class", "probability")
FOLD_FROM = 1_000  # files: fewer do not earn back the time to fold the network, which is up to half a second


def parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser("predict", description=__doc__.partition(": ")[2])
    parser.add_argument("run", type=user_path, metavar="RUN", help="Folder of a run, or an exported .safetensors, "
                        ".pt2 or .onnx file.")  # fmt: skip
    parser.add_argument("images", nargs="+", type=user_path, metavar="FILE", help="Image files, and folders of them.")
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="Classes for each file, the most probable "
                        "first. (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON instead of columns.")
    parser.add_argument("--csv", type=user_path, metavar="FILE", help="Write the columns to this file too.")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="Images at once. (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--checkpoint", type=user_path, metavar="FILE", help="Use its weights, not the final ones.")
    parser.add_trust_code()
    parser.add_quiet()
    parser.add_argument("--engine.device", dest="device", default="auto", help="Device for a run: auto, cpu, cuda or "
                        "cuda:N. (default: %(default)s)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Predict the classes of the images that the command line names, and return the exit status."""
    arguments = parser().parse_args(argv)
    files = image_files(arguments.images)
    predictor = runs.load_run(
        arguments.run,
        arguments.checkpoint,
        [f"--engine.device={arguments.device}"],
        trust_code=arguments.trust_code == "true",
        fold=len(files) >= FOLD_FROM,
    )
    top = min(arguments.top, len(predictor.data.classes))
    rows: list[tuple[str, str, float]] = []
    failed = 0
    if not arguments.json:
        print(",".join(COLUMNS))
    for start in range(0, len(files), arguments.batch_size):
        found, unread = predict(predictor, files[start : start + arguments.batch_size], top)
        failed += unread
        rows += found
        if not arguments.json:
            print(as_csv(found), end="", flush=True)
    if arguments.json:
        print(json_of([dict(zip(COLUMNS, row, strict=True)) for row in rows], indent=2))
    if arguments.csv is not None:
        try:
            write_text(arguments.csv, ",".join(COLUMNS) + "\n" + as_csv(rows))
        except OSError as error:
            raise UsageError(f"--csv {arguments.csv}: cannot be written ({error.strerror}); choose another") from None
    return 1 if failed else 0


def image_files(paths: list[Path]) -> list[Path]:
    """Return the named files, and the image files below the named folders in the order of their names.

    Raises:
        UsageError: if a path does not exist or a folder has no image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in data.image_suffixes()]
            if not below:
                raise UsageError(f"{path}: has no image files; name files or a folder of images")
            files += below
        elif not path.exists() and not path.is_symlink():
            raise UsageError(f"{path}: does not exist; name files or folders of images")
        else:
            files.append(path)
    return files


def predict(predictor: Predictor, files: list[Path], top: int) -> tuple[list[tuple[str, str, float]], int]:
    """Return `top` rows for each file, and the number of files that could not be read, after a line about each."""
    images, read = [], []
    for path in files:
        try:
            images.append(predictor.prepare(data.decode(path, exif=predictor.data.exif)))
            read.append(path)
        except UsageError as error:
            complain(str(error))
    if not images:
        return [], len(files)
    found = zip(read, predictor.best(images, top), strict=True)
    return [(str(path), name, share) for path, best in found for name, share in best], len(files) - len(read)


def as_csv(rows: list[tuple[str, str, float]]) -> str:
    """Return the rows as lines of CSV, with probabilities of six digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows((file, name, f"{probability:.6f}") for file, name, probability in rows)
    return text.getvalue()


if __name__ == "__main__":
    run_command(main)
