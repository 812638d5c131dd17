"""`fastres export RUN`: export a run's network as safetensors, torch_export or ONNX, and verify it.

The network is exported in fp32 and for inference. It takes normalised images (N, C, S, S), for any N, and returns
logits (N, classes).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from fastres import runs
from fastres.runs.exporting import FORMATS, export
from fastres.utils.errors import Parser, UsageError, run_command, user_path


def format_name(text: str) -> str:
    """Return the name of a format, which may also be written as torch.export or torch-export."""
    return text.replace(".", "_").replace("-", "_")


def parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser("export", description=__doc__.partition(": ")[2])
    parser.add_argument("run", type=user_path, metavar="RUN", help="Folder of a run.")
    parser.add_argument("--format", type=format_name, choices=FORMATS, default="safetensors", help="Format of the "
                        "file. (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=user_path, metavar="FILE", help="File to write. (default: export.safetensors, "
                        "export.pt2 or export.onnx in the run)")  # fmt: skip
    parser.add_argument("--checkpoint", type=user_path, metavar="FILE", help="Use its weights, not the final ones.")
    parser.add_trust_code()
    parser.add_quiet()
    parser.add_argument("--data.image_size", dest="side", metavar="S", help="Side of an image in pixels. "
                        "(default: the run's)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Export the run that the command line names."""
    arguments = parser().parse_args(argv)
    format_ = FORMATS[arguments.format]
    if missing := [package for package in format_.needs if importlib.util.find_spec(package) is None]:
        raise UsageError(f"--format {arguments.format}: {missing[0]} is not installed; pip install 'fastres[export]'")
    flags = [f"--model.trust_code={arguments.trust_code}"]
    flags += [] if arguments.side is None else [f"--data.image_size={arguments.side}"]
    config, weights = runs.read_run(arguments.run, arguments.checkpoint, flags)
    output: Path = arguments.output or arguments.run / f"export{format_.suffix}"
    if output.exists():
        raise UsageError(f"--output {output}: already exists; choose another or remove it")
    data = runs.load_description(arguments.run)
    if data is not None and arguments.side is not None:
        data = dataclasses.replace(data, image_size=config.data.image_size or data.image_size)
    difference, shape = export(config, weights, arguments.format, output, data)
    print(
        f"{output}: {config.model.name} in fp32 for images {('N', *shape)}".replace("'", "")
        + f"; the reloaded network's logits differ by at most {difference:.2g}"
    )


if __name__ == "__main__":
    run_command(main)
