"""Two hosts: network namespaces with addresses of their own, joined by a cable that a test can pull.

docs/several-nodes.md describes the results, and these tests show them. They need `ip` (iproute2) and the right to
create a network namespace, which root has, and everybody has if user namespaces are allowed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from fastres.runs import checkpoint
from fastres.runs.history import read_metrics
from fastres.train import main
from tests.commands import users_environment
from tests.fixtures import sha256

STEPS = 150
FLAGS = (f"--recipe digits --model.name resnet8 --train.steps {STEPS} --train.log_every 1 "
         "--train.eval_every 1000 --engine.precision fp32 --run.checkpoint_every 20").split()  # fmt: skip
CABLE = "cable0"  # the name of its end in each namespace, which no other namespace sees
LIMIT_S = 240  # limit of every wait; much more than a busy machine needs


class Host:
    """A network namespace: a loopback, one end of the cable, an address."""

    def __init__(self, holder: subprocess.Popen[str], address: str, enter: list[str]) -> None:
        self.holder = holder
        self.address = address
        self.enter = enter
        self.namespace = Path(f"/proc/{holder.pid}/ns/net").readlink()

    def do(self, command: str) -> None:
        done = subprocess.run([*self.enter, "sh", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def cut(self) -> None:
        """Pull the cable: nothing passes in either direction, and no connection is closed."""
        self.do(f"ip link set {CABLE} down")

    def mend(self) -> None:
        self.do(f"ip link set {CABLE} up")

    def clear(self) -> None:
        """End the processes that still run in the namespace, and no others."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # one that has just ended
                here = (process / "ns/net").readlink() == self.namespace
                if here and int(process.name) != self.holder.pid:
                    os.kill(int(process.name), signal.SIGKILL)


@contextmanager
def host(address: str, beside: Host | None = None) -> Iterator[Host]:
    """Create a namespace without a name, so that parallel tests share nothing and nothing has to be removed.

    It ends with the last process in it. The process that holds it is a `cat` that ends when this process does, for
    whatever reason.
    """
    own = ["--user", "--map-root-user"]  # without rights over the network, those over a user namespace's are enough
    failures = []
    for flags in ([],) if beside else ([], own):
        holder = subprocess.Popen(
            [*(beside.enter if beside else ()), "unshare", *flags, "--net",
             "sh", "-c", "ip link set lo up && echo ready && exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert holder.stdin and holder.stdout and holder.stderr
        with holder:
            if holder.stdout.readline() != "ready\n":
                failures.append(holder.stderr.read().strip())
                continue
            users = bool(flags) or (beside is not None and "--user" in beside.enter)
            into = ["--user", "--preserve-credentials"] if users else []
            made = Host(holder, address, ["nsenter", f"--target={holder.pid}", *into, "--net"])
            try:
                yield made
            finally:
                made.clear()
            return
    pytest.skip(f"no network namespace can be had here: {'; '.join(failures)}")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Create 10.77.0.1, which keeps the rendezvous and is rank 0, and 10.77.0.2."""
    missing = [command for command in ("ip", "unshare", "nsenter") if not shutil.which(command)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: two hosts take the packages iproute2 and util-linux")
    with ExitStack() as stack:
        a = stack.enter_context(host("10.77.0.1"))
        b = stack.enter_context(host("10.77.0.2", beside=a))
        a.do(f"ip link add {CABLE} type veth peer name {CABLE} netns {b.holder.pid}")
        for end in (a, b):
            end.do(f"ip address add {end.address}/24 dev {CABLE}")
            end.mend()
        yield a, b


class Launcher:
    """torchrun on a host, with one process or as many as `how` says; the processes talk over `interface`."""

    def __init__(self, on: Host, how: list[str], run: Path, *flags: object, interface: str = CABLE) -> None:
        command = [
            *on.enter, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", *how,
            "-m", "fastres.train", *FLAGS, *map(str, flags), "--run.dir", str(run),
        ]  # fmt: skip
        self.log = run.with_suffix(".log")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=users_environment({"GLOO_SOCKET_IFNAME": interface})
            )

    def ends(self) -> int:
        """Wait for the launcher and return its exit status."""
        return self.process.wait(LIMIT_S)


def with_rendezvous(on: Host, first: Host) -> list[str]:
    """Return the options of the first command of docs/several-nodes.md."""
    return [
        "--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={first.address}:29400", "--rdzv_id=test",
        # Both have the machine's name, which tells neither their addresses nor the rendezvous' host.
        f"--local_addr={on.address}", f"--rdzv_conf=is_host={on is first}",
    ]  # fmt: skip


def fixed(on: Host, first: Host) -> list[str]:
    """Return the options of the command for a fixed number of hosts."""
    return ["--nnodes=2", f"--node_rank={on is not first:d}", f"--master_addr={first.address}",
            "--master_port=29400"]  # fmt: skip


def launch(hosts: tuple[Host, Host], folder: Path, how: Callable[[Host, Host], list[str]],
           *flags: object) -> list[Launcher]:  # fmt: skip
    """Start the same command on both hosts, each with its own run.dir; only rank 0 may create its folder."""
    return [Launcher(on, how(on, hosts[0]), folder / name, *flags) for on, name in zip(hosts, ("a", "b"), strict=True)]


def step_of(run: Path) -> int:
    """Return the last step that is logged."""
    rows = read_metrics(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def wait_for(what: str, condition: Callable[[], bool], launchers: list[Launcher]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        said = "\n".join(launcher.log.read_text() for launcher in launchers)
        assert all(launcher.process.poll() is None for launcher in launchers), f"ended before {what}:\n{said}"
        assert time.monotonic() < deadline, f"{what} did not come:\n{said}"
        time.sleep(0.01)


def stalls(run: Path, launchers: list[Launcher]) -> int:
    """Wait until no step has been logged for two seconds, and return the last one."""
    last, since = step_of(run), time.monotonic()

    def still() -> bool:
        nonlocal last, since
        if (now := step_of(run)) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > 2

    wait_for("a stop", still, launchers)
    return last


@pytest.mark.slow
def test_two_hosts_train_the_weights_of_two_processes_on_one_and_survive_a_short_cut(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    one_host = Launcher(hosts[0], ["--standalone", "--nproc_per_node=2"], tmp_path / "one_host", interface="lo")
    launchers = launch(hosts, tmp_path, with_rendezvous)
    wait_for("step 50", lambda: step_of(tmp_path / "a") >= 50, launchers)
    hosts[1].cut()
    step = stalls(tmp_path / "a", launchers)
    assert step < STEPS, "cut too late to show anything"
    hosts[1].mend()
    assert [launcher.ends() for launcher in launchers] == [0, 0], launchers[0].log.read_text()
    assert one_host.ends() == 0, one_host.log.read_text()
    assert sha256(tmp_path / "a/model.safetensors") == sha256(tmp_path / "one_host/model.safetensors")
    assert not (tmp_path / "b").exists()  # only rank 0 reads and writes run.dir


@pytest.mark.slow
def test_a_permanent_cut_ends_both_hosts_and_the_run_resumes_on_one(
    hosts: tuple[Host, Host], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run.timeout_s", "6"]
    launchers = launch(hosts, tmp_path, fixed, *flags)
    wait_for("step 50", lambda: step_of(tmp_path / "a") >= 50, launchers)
    hosts[1].cut()
    assert [launcher.ends() for launcher in launchers] == [1, 1]  # TCP would wait for a quarter of an hour
    assert step_of(tmp_path / "a") < STEPS, "cut too late to show anything"
    verdicts = ("rank 1 does not answer", "the processes cannot reach each other, nor the launcher's store")
    for rank, (launcher, verdict) in enumerate(zip(launchers, verdicts, strict=True)):
        said = launcher.log.read_text()
        (line,) = [line for line in said.splitlines() if "fastres: error: " in line]
        assert line.startswith(f"fastres: error: rank {rank}: no step for 6 s: {verdict}"), said
        assert "fastres/" not in said, said  # one line, and no traceback through fastres

    kept = checkpoint.found(tmp_path / "a/checkpoints")
    assert int(kept[0].stem[5:]) >= 40
    for path in kept:
        checkpoint.load(path)  # intact
    assert not (tmp_path / "b").exists()
    assert main([*FLAGS, *flags, "--run.dir", str(tmp_path / "a")]) == 0
    assert f"resumed at step {int(kept[0].stem[5:])}" in capsys.readouterr().out
    assert step_of(tmp_path / "a") == STEPS
