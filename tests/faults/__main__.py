"""`python -m tests.faults [NUMBER or NAME ...]`: introduce faults one at a time, and check that the tests catch them.

Each fault of faults.yaml is applied to a copy of the checkout, in which the tests of its area then run. A fault that no
test catches has escaped. At the end, the tests that failed run once more without any fault. The checkout itself is not
changed. Exit status 0 if every fault was caught, 1 if one has escaped, 2 if one cannot be applied, its tests cannot
run, or they fail without it too. Without --slow, a fault that only slow tests could catch does not count as escaped.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.commands import ROOT
from tests.faults import Fault, load_faults, table

LIMIT_S = 600.0  # of the tests of one fault, which is then an error, because a fault must not hang
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", re.MULTILINE)  # in pytest's summary


NO_TESTS = 5  # pytest's exit status if it has selected no test
CAUGHT, ESCAPED, SLOW = "caught", "ESCAPED", "slow"  # verdicts; slow: all tests that could catch it are marked so


class Broken(Exception):
    """A fault that cannot be applied, or whose tests cannot run."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition(": ")[2])
    made.add_argument("faults", nargs="*", metavar="NUMBER or NAME", help="faults to introduce (default: all); a part "
                      "of a name stands for all names that have it")  # fmt: skip
    made.add_argument("--slow", action="store_true", help="run the tests that are marked slow too")
    made.add_argument("--list", action="store_true", help="print the faults as a table, and run nothing")
    return made


def chosen(faults: list[Fault], words: list[str]) -> list[tuple[int, Fault]]:
    """Return the faults that a number or a part of a name selects, with their numbers, or all without words."""
    numbered = list(enumerate(faults, 1))
    if not words:
        return numbered
    for word in words:
        if not any(_selects(word, *one) for one in numbered):
            raise Broken(f"{word!r} is neither a number from 1 to {len(faults)} nor a part of a fault's name")
    return [one for one in numbered if any(_selects(word, *one) for word in words)]


def _selects(word: str, number: int, fault: Fault) -> bool:
    return int(word) == number if word.isdecimal() else word.lower() in fault.name.lower()


def copy_checkout(to: Path) -> None:
    """Copy all files of the checkout that git does not ignore, also those that it does not track yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a file may have been deleted
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def environment(copy: Path) -> dict[str, str]:
    """Return the environment in which Python imports the packages of the copy, also in processes that tests start.

    An installation in editable mode finds the packages of the checkout, but only after the folders of PYTHONPATH. The
    folder kernels/ is imported as fastres_kernels, so a link gives it that name.
    """
    links = copy / "imported_as"
    links.mkdir(exist_ok=True)
    if not (links / "fastres_kernels").is_symlink():
        (links / "fastres_kernels").symlink_to(Path("..") / "kernels")
    earlier = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(links), str(copy), *earlier])}


def check_imports(copy: Path, env: dict[str, str]) -> None:
    """Raise Broken if a process that runs elsewhere would import a package that is not the copy's."""
    packages = ("fastres", "fastres_kernels", "bench", "tests")
    code = "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]), sep='\\n')"
    command = [sys.executable, "-c", code, *packages]
    done = subprocess.run(command, cwd=copy.parent, env=env, check=True, capture_output=True, text=True)
    for name, file in zip(packages, done.stdout.splitlines(), strict=True):
        if not Path(file).is_relative_to(copy):
            raise Broken(f"the package {name} would be imported from {file} instead of the copy in {copy}")


def introduce(fault: Fault, copy: Path, env: dict[str, str], *, slow: bool) -> tuple[str, str]:
    """Introduce the fault, run its tests and restore the file; return the verdict, and the test that failed or "-"."""
    try:
        content = fault.applied_to(copy)
    except (OSError, ValueError) as error:
        raise Broken(str(error)) from None
    try:
        (copy / fault.file).write_text(content, encoding="utf-8")
        selected = ["-m", "slow or not slow" if slow else "not slow"]
        status, output = run_tests(["-x", *selected, *shlex.split(fault.tests)], copy, env)
    finally:
        shutil.copy2(ROOT / fault.file, copy / fault.file)  # with its old time, so that its compiled code is valid
    if status == 0:
        return ESCAPED, "-"
    if status == NO_TESTS and not slow:
        return SLOW, "-"
    if found := FAILED.search(output):
        return CAUGHT, found[1]
    raise Broken(f"fault {fault.name!r}: pytest ended with status {status} and no failed test:\n{output[-2000:]}")


def run_tests(arguments: list[str], copy: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run pytest in the copy, and return its exit status and its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    with subprocess.Popen(
        command, cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Broken(f"pytest {shlex.join(arguments)} did not end within {LIMIT_S:g} s") from None
            raise
    return process.returncode, output


def check_without_faults(tests: list[str], copy: Path, env: dict[str, str]) -> None:
    """Raise Broken if one of the tests that failed with a fault also fails without any, and so shows nothing."""
    status, output = run_tests(["-m", "slow or not slow", *tests], copy, env) if tests else (0, "")
    if status != 0:
        raise Broken(f"without any fault, {', '.join(FAILED.findall(output)) or output[-2000:]} fails too")


def run_faults(faults: list[tuple[int, Fault]], *, slow: bool) -> int:
    """Introduce each fault, print a line for each and the total, and return the number of faults that escaped."""
    verdicts: Counter[str] = Counter()
    failed: dict[str, None] = {}  # the tests, each once
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy = Path(folder).resolve() / "checkout"
        copy_checkout(copy)
        env = environment(copy)
        check_imports(copy, env)
        for number, fault in faults:
            start = time.perf_counter()
            verdict, test = introduce(fault, copy, env, slow=slow)
            print(f"{number:>2} {verdict:<7} {time.perf_counter() - start:5.1f} s  {test}  {fault.name}", flush=True)
            verdicts[verdict] += 1
            if verdict == CAUGHT:
                failed[test] = None
        check_without_faults(list(failed), copy, env)
    total = f"{len(faults)} faults: {verdicts[CAUGHT]} caught, {verdicts[ESCAPED]} escaped"
    print(total + (f", {verdicts[SLOW]} need --slow" if verdicts[SLOW] else ""))
    return verdicts[ESCAPED]


def main(argv: list[str] | None = None) -> int:
    """Introduce the faults that the command line names, and return the exit status."""
    arguments = parser().parse_args(argv)
    faults = load_faults()
    if arguments.list:
        print(table(faults), end="")
        return 0
    try:
        return 1 if run_faults(chosen(faults, arguments.faults), slow=arguments.slow) else 0
    except Broken as error:
        print(f"tests.faults: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
