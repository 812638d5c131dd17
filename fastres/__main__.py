"""`fastres COMMAND`, or `python -m fastres COMMAND`: hand the rest of the command line to a command's main()."""

from __future__ import annotations

import argparse
import importlib
import sys

from fastres.utils.errors import Parser, UsageError, run_command
from fastres.utils.suggest import unknown

COMMANDS = {
    "train": "train a network from a recipe, from files or from flags",
    "predict": "predict the classes of images with a run or an exported file",
    "evaluate": "evaluate a run on the test set",
    "export": "export a run's network as safetensors, torch.export program or ONNX",
    "plot": "plot the curves of runs and print their final accuracies",
    "profile": "measure variants of a network side by side, or what limits a run",
    "doctor": "check what this machine has for training",
}
SHELLS = ("bash", "zsh", "fish")


def parser() -> Parser:
    """Return the parser of a command line that starts with no command."""
    made = Parser(
        usage="%(prog)s COMMAND [ARGUMENT]...",
        description="Train residual networks, and use what was trained.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "".join(f"  {name:<10}{purpose}\n" for name, purpose in COMMANDS.items())
        + "\n%(prog)s COMMAND --help describes a command. For several processes, use torchrun --nproc_per_node N -m "
        "fastres.train.",
    )
    made.add_argument("--print-completion", choices=SHELLS, metavar="SHELL", help="Print a script for bash, zsh or "
                      "fish, which completes commands and flags by the Tab key.")  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command that the command line names, and return the exit status.

    Only the command's module is imported.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"fastres.{argv[0]}").main(argv[1:]) or 0
    root = parser()
    arguments, others = root.parse_known_args(argv)
    if others and arguments.print_completion:
        raise UsageError(f"{others[0]}: --print-completion takes the name of a shell and nothing else")
    if others and others[0].startswith("-"):
        raise UsageError(f"unknown flag {others[0]}; a command's flags follow its name, as in {root.prog} train --help")
    if others:
        raise UsageError(str(unknown("command", others[0], COMMANDS)))
    if arguments.print_completion is None:
        raise UsageError(f"no command is given; choose from {', '.join(COMMANDS)}, or use --help")
    from fastres.completion import script

    print(script(arguments.print_completion, root, COMMANDS))
    return 0


def run() -> None:
    """Run main() and exit with its status: the installed command `fastres`."""
    run_command(main)


if __name__ == "__main__":
    run()
