"""Two hosts: network namespaces with addresses of their own, joined by a cable that can be pulled.

docs/several-nodes.md says what happens; these tests show it. They take `ip` (iproute2), and the right to make a network
namespace: root has it, and so has everybody where user namespaces are allowed.
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

from fastres import checkpoint
from fastres.config import RunConfig
from fastres.log import read_metrics
from tests.commands import run_fastres, users_environment
from tests.test_train import sha256

STEPS = 150
FLAGS = (f"--recipe digits --train.steps {STEPS} --train.log_every 1 --train.eval_every 50 "
         "--engine.precision fp32 --run.checkpoint_every 20").split()  # fmt: skip
CABLE = "cable0"  # the name of its end in each namespace, which no other namespace sees
LIMIT_S = 240  # of every wait: much more than it takes on a busy machine


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
        """Pulls the cable: nothing passes, in either direction, and no connection is told."""
        self.do(f"ip link set {CABLE} down")

    def mend(self) -> None:
        self.do(f"ip link set {CABLE} up")

    def clear(self) -> None:
        """Ends what still runs in the namespace, and nothing else."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # one that has just ended
                here = (process / "ns/net").readlink() == self.namespace
                if here and int(process.name) != self.holder.pid:
                    os.kill(int(process.name), signal.SIGKILL)


@contextmanager
def host(address: str, beside: Host | None = None) -> Iterator[Host]:
    """A namespace without a name, so that parallel tests share nothing, and nothing is left to remove: it ends with the
    last process in it. The one that holds it is a `cat` that ends when this process does, however that comes about."""
    own = ["--user", "--map-root-user"]  # whoever may not change the network may change a user namespace's
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
    """10.77.0.1, which keeps the rendezvous and is rank 0, and 10.77.0.2."""
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
    """torchrun on a host, as docs/several-nodes.md has it."""

    def __init__(self, on: Host, endpoint: Host, log: Path, *flags: object) -> None:
        command = [
            *on.enter, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
            "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint.address}:29400", "--rdzv_id=test",
            # The two have one name, the machine's: it says neither where they are nor who keeps the rendezvous.
            f"--local_addr={on.address}", f"--rdzv_conf=is_host={on is endpoint}",
            "-m", "fastres.train", *map(str, flags),
        ]  # fmt: skip
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=users_environment({"GLOO_SOCKET_IFNAME": CABLE}),
            )

    def ends(self) -> int:
        """Its exit status."""
        return self.process.wait(LIMIT_S)


def launch(hosts: tuple[Host, Host], folder: Path, *flags: object) -> list[Launcher]:
    """The same command on both. Each has a run.dir of its own: only that of rank 0 may come to be."""
    return [
        Launcher(on, hosts[0], folder / f"{name}.log", *FLAGS, *flags, "--run.dir", folder / name)
        for on, name in zip(hosts, ("a", "b"), strict=True)
    ]


def step_of(run: Path) -> int:
    """The last one logged."""
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
    """Waits until no step has been logged for two seconds; that step."""
    last, since = step_of(run), time.monotonic()

    def still() -> bool:
        nonlocal last, since
        if (now := step_of(run)) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > 2

    wait_for("a stop", still, launchers)
    return last


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the weights that two processes on one host train."""
    run = tmp_path_factory.mktemp("one_host") / "run"
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 -m fastres.train".split()
    done = subprocess.run(
        [sys.executable, *launcher, *FLAGS, "--run.dir", str(run)],
        capture_output=True, text=True, env=users_environment(), timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sha256(run / "model.safetensors")


def test_two_hosts_train_what_two_processes_on_one_do(
    hosts: tuple[Host, Host], one_host: str, tmp_path: Path
) -> None:
    launchers = launch(hosts, tmp_path)
    assert [launcher.ends() for launcher in launchers] == [0, 0], launchers[0].log.read_text()
    assert sha256(tmp_path / "a/model.safetensors") == one_host
    assert not (tmp_path / "b").exists()  # only rank 0 reads and writes run.dir


def test_a_cut_of_seconds_is_waited_for(hosts: tuple[Host, Host], one_host: str, tmp_path: Path) -> None:
    launchers = launch(hosts, tmp_path)
    wait_for("step 50", lambda: step_of(tmp_path / "a") >= 50, launchers)
    hosts[1].cut()
    step = stalls(tmp_path / "a", launchers)
    assert step < STEPS, "cut too late to show anything"
    hosts[1].mend()
    assert [launcher.ends() for launcher in launchers] == [0, 0], launchers[0].log.read_text()
    assert sha256(tmp_path / "a/model.safetensors") == one_host


@pytest.mark.skipif(not hasattr(RunConfig, "timeout_s"), reason="run.timeout_s is not in this version")
def test_a_cut_for_good_ends_both_hosts_and_the_run_goes_on_elsewhere(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    # torchrun's launcher on the second host waits on its connection to the first one for as long as TCP keeps it: 16
    # minutes unless told otherwise. Retransmitting 6 times takes 25 s, which is more than the run's own 15.
    for end in hosts:
        end.do("echo 6 > /proc/sys/net/ipv4/tcp_retries2")
    launchers = launch(hosts, tmp_path, "--run.timeout_s", 15)
    wait_for("step 50", lambda: step_of(tmp_path / "a") >= 50, launchers)
    hosts[1].cut()
    assert [launcher.ends() for launcher in launchers] == [1, 1]
    assert step_of(tmp_path / "a") < STEPS, "cut too late to show anything"
    for launcher in launchers:
        said = launcher.log.read_text()
        lines = [line for line in said.splitlines() if "fastres: error: " in line]
        assert len(lines) == 1 and "fastres/train.py" not in said, said  # a line, and no traceback of ours

    kept = checkpoint.found(tmp_path / "a/checkpoints")
    assert int(kept[0].stem[5:]) >= 40
    for path in kept:
        checkpoint.load(path)  # intact
    assert not (tmp_path / "b").exists()
    again = run_fastres("train", *FLAGS, "--run.timeout_s", "15", "--run.dir", tmp_path / "a")
    assert again.returncode == 0, again.stderr
    assert f"continued at step {int(kept[0].stem[5:])}" in again.stdout
    assert step_of(tmp_path / "a") == STEPS
