"""`python -m tests.soak`: kill runs at random moments and restart them, hundreds of times; nothing may be lost.

A victim is a small run of fastres.train. The soak kills it with SIGKILL and restarts it until it is complete. After
every kill the files in its folder have to be whole: each checkpoint loads, the newest one is at most one interval
behind the metrics, and every other file either equals that of an undisturbed run or does not exist. At the end, weights
and metrics have to be bitwise identical to those of the undisturbed run.

Most victims are forked from a process that has imported everything and done nothing else, because importing torch takes
seconds. They are processes of their own. A share of the starts runs the complete `python -m fastres.train`, so that
some kills hit its imports. With --processes 2 all victims run under torchrun. The soak needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.commands import Forked, start_module, torchrun
from tests.fixtures import sha256

STEPS, EVAL_EVERY = 24, 6
FLAGS = (f"--recipe digits --model.name resnet8 --train.steps {STEPS} --train.eval_every {EVAL_EVERY} "
         "--train.log_every 1 --train.batch_size 32 --schedule.warmup_steps 3 --engine.precision fp32"
         ).split()  # fmt: skip
TIMES = {"images_per_s", "train_time_s"}  # the only fields of a row of metrics that may differ
AIMS = {"any moment": 0.5, "a write": 0.35, "an evaluation": 0.15}  # shares of the kills
FULL_SHARE = 0.1  # share of the starts that are not forked
LAUNCHER_SHARE = 0.25  # share of the kills under torchrun that hit the launcher
PHASES = ("start-up", "training", "checkpoint write", "evaluation", "end")
PNG_END = b"IEND\xaeB`\x82"
TICK_S = 0.0005
ORPHANS_S = 20.0
HANGS_AFTER_S = 300.0

Row = dict[str, Any]


# ---- processes ----------------------------------------------------------------------------------------------


def started(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own that writes into `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
            start_new_session=True,
        )  # fmt: skip


def workers_of(folder: Path) -> dict[int, int]:
    """Return the pid and rank of each process that torchrun has started for the run in `folder`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in (process / "cmdline").read_bytes().split(b"\0"):
                for variable in (process / "environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        found[int(process.name)] = int(variable[5:])
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + HANGS_AFTER_S
    while not condition():
        if time.monotonic() > deadline:
            raise Lost(f"{what} after {HANGS_AFTER_S:.0f} s")
        time.sleep(0.005)


# ---- what a run leaves behind -------------------------------------------------------------------------------


class Lost(Exception):
    """A file was lost, is corrupt, or has unexpected content."""


def metrics_of(folder: Path) -> tuple[list[Row], bool]:
    """Return the complete rows of metrics.jsonl without times, and True if another row was cut short."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    rows = [json.loads(line) for line in lines[:-1]]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows], lines[-1] != ""


def history_of(folder: Path) -> list[Row]:
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


class Undisturbed:
    """The files of a run that nobody kills."""

    def __init__(self, folder: Path) -> None:
        import yaml

        self.config = yaml.safe_load((folder / "config.yaml").read_text())
        self.rows, _ = metrics_of(folder)
        self.history = history_of(folder)
        self.summary = set(json.loads((folder / "summary.json").read_text()))
        self.environment = set(json.loads((folder / "env.json").read_text()))
        self.weights = sha256(folder / "model.safetensors")

    def compare(self, folder: Path, every: int) -> int:
        """Return the newest step saved. Raise Lost if a file in the folder is damaged or not this run's."""
        import yaml

        newest = newest_checkpoint(folder)
        try:
            self._compare_descriptions(folder, every, newest)
            logged = self._compare_rows(folder)
        except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise Lost(f"a file of {folder} cannot be read: {type(error).__name__}: {error}") from None
        picture, weights = folder / "history.png", folder / "model.safetensors"
        if picture.exists() and not picture.read_bytes().endswith(PNG_END):
            raise Lost("history.png is cut short")
        if weights.exists():
            same("model.safetensors", sha256(weights), self.weights)
        # A step is logged before it is saved, so the last one logged may not have been saved.
        if newest < (logged - 1) // every * every:
            raise Lost(f"step {logged} was logged, and the newest checkpoint is of step {newest}")
        return newest

    def _compare_descriptions(self, folder: Path, every: int, newest: int) -> None:
        """Compare config.yaml, env.json and summary.json, as far as they exist."""
        import yaml

        config = folder / "config.yaml"
        if config.exists():
            wanted = {**self.config, "run": {**self.config["run"], "checkpoint_every": every}}
            same("config.yaml", yaml.safe_load(config.read_text()), wanted)
        elif newest:
            raise Lost("config.yaml is not there, but a checkpoint")
        for name, wanted_keys in (("env.json", self.environment), ("summary.json", self.summary)):
            if (folder / name).exists():
                same(name, set(json.loads((folder / name).read_text())), wanted_keys)

    def _compare_rows(self, folder: Path) -> int:
        """Compare history.csv and metrics.jsonl, as far as they exist. Return the last step logged."""
        if (folder / "history.csv").exists():
            rows = history_of(folder)
            same("history.csv", rows, self.history[: len(rows)] or "a header and rows")
        rows, _ = metrics_of(folder)
        for number, row in enumerate(rows):
            same(f"row {number} of metrics.jsonl", row, self.rows[number] if number < len(self.rows) else None)
        return rows[-1]["step"] if rows else 0


def same(what: str, found: Any, wanted: Any) -> None:
    """Raise Lost if what was found is not what was wanted."""
    if found != wanted:
        raise Lost(f"{what} is {str(found)[:200]}, not {str(wanted)[:200]}")


def newest_checkpoint(folder: Path) -> int:
    """Return the newest step saved. Raise Lost if a checkpoint cannot be read or has another step's name."""
    from fastres.runs import checkpoint
    from fastres.utils.errors import UsageError

    newest = 0
    for path in checkpoint.found(folder / "checkpoints"):
        try:
            step = checkpoint.load(path)["step"]
        except UsageError as error:
            raise Lost(str(error)) from None
        same(path.name, path.stem, f"step-{step:08d}")
        newest = max(newest, step)
    return newest


# ---- a victim -----------------------------------------------------------------------------------------------


class Victim:
    """A run in a folder of its own that is killed and restarted until it is complete."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak, self.random = soak, random.Random(f"{soak.seed} {number}")
        self.folder, self.log = soak.scratch / f"victim{number}", soak.scratch / f"victim{number}.log"
        self.every = self.random.choice((1, 2, 3))
        self.argv = [*FLAGS, f"--run.checkpoint_every={self.every}", "--run.dir", str(self.folder)]
        self.newest = 0  # step of the newest checkpoint
        self.process: Forked | subprocess.Popen[bytes] | None = None
        self.kind = ""  # the way it was started

    def until_complete(self) -> None:
        try:
            while (status := self.life()) is None:
                pass
            if status != 0:
                raise Lost(f"it ended with status {status}: {self.log.read_text()[-1500:]}")
            self.soak.undisturbed.compare(self.folder, self.every)
            rows, cut = metrics_of(self.folder)
            if rows != self.soak.undisturbed.rows or cut:
                raise Lost("metrics.jsonl does not have each row of the undisturbed run once")
            if history_of(self.folder) != self.soak.undisturbed.history:
                raise Lost("history.csv is not that of the undisturbed run")
            self.soak.completed(sha256(self.folder / "model.safetensors"))
        except Lost as loss:
            self.soak.lost(f"{self.folder.name}, checkpoints every {self.every}: {loss}")
        finally:
            if self.process is not None:
                kill(self.process.pid)
                self.process.poll()
            for pid in workers_of(self.folder):
                kill(pid)

    def life(self) -> int | None:
        """Start the run and wait for a kill or the end. Return the exit status, or None if it was killed."""
        began = time.monotonic()
        self.env_at_start, self.step_at_start = self.changed("env.json"), self.newest
        self.old = dict(self.temporaries())
        self.process = self.start()
        killing = self.soak.may_kill()
        aim, now = self.aim() if killing else ("", lambda: False)
        while (status := self.process.poll()) is None and not now():
            time.sleep(TICK_S if killing else 0.01)
            if time.monotonic() - began > HANGS_AFTER_S:
                raise Lost(f"it hangs: {self.log.read_text()[-1500:]}")
        if status is not None:
            self.process = None
            self.soak.spared(killing)
            return status
        struck = self.strike()
        phase, other = self.phase()
        self.soak.killed(phase, other, f"{self.kind} {struck}", aim)
        newest = self.soak.undisturbed.compare(self.folder, self.every)
        if newest < self.newest:
            raise Lost(f"the newest checkpoint is of step {newest}; there was one of step {self.newest}")
        self.newest = newest
        return None

    def start(self) -> Forked | subprocess.Popen[bytes]:
        if self.soak.processes == 1 and self.random.random() >= FULL_SHARE:
            self.kind = "forked"
            return start_module("fastres.train", *self.argv, stdout=self.log)
        self.kind = "torchrun's" if self.soak.processes > 1 else "whole"
        return started([*self.soak.launcher, "-m", "fastres.train", *self.argv], self.log, self.soak.environment)

    def aim(self) -> tuple[str, Callable[[], bool]]:
        """Return the aim of the kill, and a function that returns True when the moment has come."""
        aim = self.random.choices(list(AIMS), list(AIMS.values()))[0]
        at = time.monotonic() + self.random.uniform(0, self.soak.lifetime[self.kind])
        nth, seen = self.random.randrange(1, 7), set[tuple[Path, int]]()
        delay = self.random.choice((0.0, self.random.uniform(0, 0.01)))
        env = self.env_at_start

        def any_moment() -> bool:
            return time.monotonic() >= at

        def write() -> bool:
            fresh = self.temporaries().items() - self.old.items()
            seen.update((path, 0) for path, _ in fresh)
            if fresh and len(seen) >= nth:
                time.sleep(delay)
                return True
            return False

        def evaluation() -> bool:
            if self.changed("env.json") != env and self.evaluates():
                time.sleep(delay)
                return True
            return False

        return aim, {"any moment": any_moment, "a write": write, "an evaluation": evaluation}[aim]

    def strike(self) -> str:
        """Kill a process of the run, wait until all others have ended, and return which one it was."""
        assert self.process is not None
        workers = workers_of(self.folder) if self.soak.processes > 1 else {}
        if not workers or self.random.random() < LAUNCHER_SHARE:
            kill(self.process.pid)
            wait_until(lambda: self.process is None or self.process.poll() is not None, "it is not dead")
            # Workers without a launcher save and exit on their own.
            patience = time.monotonic() + ORPHANS_S
            while (orphans := workers_of(self.folder) if workers else {}) and time.monotonic() < patience:
                time.sleep(0.05)
            for pid in orphans:
                kill(pid)
            wait_until(lambda: not orphans or not workers_of(self.folder), "its workers are not dead")
            self.process = None
            return "launcher" if self.soak.processes > 1 else "process"
        pid, rank = self.random.choice(list(workers.items()))
        kill(pid)
        wait_until(lambda: self.process is None or self.process.poll() is not None, "its launcher goes on")
        wait_until(lambda: not workers_of(self.folder), "its other workers run")
        self.process = None
        return f"worker {rank}"

    # ---- the state that its files show

    def changed(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_mtime_ns if path.exists() else 0

    def temporaries(self) -> dict[Path, int]:
        """Return temporary files, being written or left by a killed writer, with the time of their last change."""
        found = {}
        for folder in (self.folder / "checkpoints", self.folder):
            for path in folder.glob("*.tmp"):
                with contextlib.suppress(OSError):
                    found[path] = path.stat().st_mtime_ns
        return found

    def evaluates(self) -> bool:
        """Return True if an evaluation follows the step of the last row."""
        with contextlib.suppress(ValueError):  # an incomplete line
            rows, _ = metrics_of(self.folder)
            return bool(rows) and rows[-1]["split"] == "train" and rows[-1]["step"] % EVAL_EVERY == 0
        return False

    def phase(self) -> tuple[str, bool]:
        """Return the phase in which the kill fell, and True if it cut a file other than a checkpoint short."""
        cut = [path for path, changed in self.temporaries().items() if self.old.get(path) != changed]
        writes = any(path.suffix == ".tmp" and path.parent == self.folder for path in cut)
        rows, _ = metrics_of(self.folder)
        last = rows[-1] if rows else {"step": 0, "split": ""}
        if any(path.parent != self.folder for path in cut):
            return "checkpoint write", writes
        if self.changed("env.json") == self.env_at_start:
            return "start-up", writes
        if last["step"] == STEPS and last["split"] == "test":
            return "end", writes
        if last["step"] <= self.step_at_start:
            return "start-up", writes
        return "evaluation" if self.evaluates() else "training", writes


# ---- all of them --------------------------------------------------------------------------------------------


class Soak:
    """All victims together: the number of kills, and their results."""

    def __init__(self, scratch: Path, *, kills: int, processes: int, seed: int, minutes: float, jobs: int) -> None:
        self.scratch, self.kills, self.processes, self.seed, self.jobs = scratch, kills, processes, seed, jobs
        self.began = time.monotonic()
        self.ends = self.began + 60 * minutes
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.launcher: list[str] = []
        if processes > 1:
            # The launcher ends with its worker, and the soak restarts it; test_distributed.py tests --max-restarts.
            self.launcher = torchrun(processes)
        self.lifetime: dict[str, float] = {}
        self.granted = self.victims = 0
        self.phases, self.ways, self.aims = Counter[str](), Counter[str](), Counter[str]()
        self.hashes, self.losses = Counter[str](), list[str]()
        self._lock = threading.Lock()

    def run(self) -> int:
        """Run all victims and return the number of losses."""
        self.undisturbed = self.reference()
        self.say(f"undisturbed: {STEPS} steps, model.safetensors {self.undisturbed.weights[:16]}")
        with ThreadPoolExecutor(self.jobs) as pool:
            for job in [pool.submit(self.victims_in_turn) for _ in range(self.jobs)]:
                job.result()
        return len(self.losses)

    def reference(self) -> Undisturbed:
        """Run undisturbed for the comparison, and measure how long a run takes."""
        ways = ["torchrun's"] if self.processes > 1 else ["whole", "forked", "forked"]
        for number, way in enumerate(ways):
            folder, log, began = (
                self.scratch / f"undisturbed{number}",
                self.scratch / f"{number}.log",
                time.monotonic(),
            )
            argv = [*FLAGS, "--run.checkpoint_every=1", "--run.dir", str(folder)]
            command = [*self.launcher, "-m", "fastres.train", *argv]
            process = (
                start_module("fastres.train", *argv, stdout=log)
                if way == "forked"
                else started(command, log, self.environment)
            )
            wait_until(lambda process=process: process.poll() is not None, "the undisturbed run runs")
            self.lifetime[way] = time.monotonic() - began
            if process.poll() != 0:
                raise SystemExit(f"the undisturbed run ended with status {process.poll()}: {log.read_text()[-1500:]}")
            found = Undisturbed(folder)
            if number == 0:
                first = found
            elif found.weights != first.weights or found.rows != first.rows:
                raise SystemExit("two undisturbed runs, one of them forked, differ")
        return first

    def victims_in_turn(self) -> None:
        while True:
            with self._lock:
                if self.granted >= self.kills or time.monotonic() > self.ends:
                    return
                self.victims += 1
                victim = Victim(self, self.victims)
            victim.until_complete()

    # Victims call these from their threads.

    def may_kill(self) -> bool:
        with self._lock:
            allowed = self.granted < self.kills and time.monotonic() < self.ends
            self.granted += allowed
            return allowed

    def spared(self, was_to_be_killed: bool) -> None:
        with self._lock:
            self.granted -= was_to_be_killed

    def killed(self, phase: str, writes: bool, way: str, aim: str) -> None:
        with self._lock:
            self.phases[phase] += 1
            self.phases["of these while another file was written"] += writes
            self.ways[way] += 1
            self.aims[aim] += 1
            kills = self.ways.total()
        if kills % 10 == 0:
            self.say(f"{kills} of {self.kills} kills, {self.hashes.total()} runs complete, {len(self.losses)} losses")

    def completed(self, weights: str) -> None:
        with self._lock:
            self.hashes[weights] += 1

    def lost(self, line: str) -> None:
        with self._lock:
            self.losses.append(line)
        self.say(f"LOST: {line}")

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {line}", flush=True)

    def summary(self) -> None:
        kills, seconds = self.ways.total(), time.monotonic() - self.began
        print(f"\n{kills} kills of {self.victims} runs in {seconds:.0f} s, seed {self.seed}")
        print("where they fell:", ", ".join(f"{name} {self.phases[name]}" for name in PHASES))
        print("in the write of another file:", self.phases["of these while another file was written"])
        print("what was killed:", ", ".join(f"{way} {count}" for way, count in sorted(self.ways.items())))
        print("aimed at:", ", ".join(f"{aim} {count}" for aim, count in sorted(self.aims.items())))
        print(f"lost or corrupt: {len(self.losses)}")
        for line in self.losses:
            print(f"  {line}")
        for weights, count in self.hashes.items():
            print(f"{count} runs complete with model.safetensors {weights}")
        print(f"the undisturbed run has           model.safetensors {self.undisturbed.weights}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--kills", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), default=1,
        help="2: under torchrun, where a worker or the launcher is killed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=60, help="no more kills after that time (default: %(default)s)"
    )
    options = vars(parser.parse_args(argv))
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        soak = Soak(Path(scratch), **options)
        soak.run()
        soak.summary()
    return 1 if soak.losses else 0


if __name__ == "__main__":
    sys.exit(main())
