"""A Slurm cluster of two nodes on this machine, for tests: real slurmctld, slurmd and munged.

Each node, and the controller, has a network and a host name of its own (namespaces), joined by a
bridge that no other process sees. All files are in one folder. Needs root, and leaves nothing
behind: the namespaces end with the processes that hold them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fork_server import ForkServer, child_environment

NODES = ("n1", "n2")
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "tc", "nsenter", "unshare")
ADDRESS = {"ctl": "10.77.0.10", "n1": "10.77.0.1", "n2": "10.77.0.2"}
CONF = """
ClusterName=lab
SlurmctldHost=ctl({ctl})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/ctl.pid
SlurmctldLogFile={folder}/ctl.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=15
InactiveLimit=0
MinJobAge=600
KillWait=3
UnkillableStepTimeout=60
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no lab here; empty where there can be."""
    tools = [name for name in TOOLS if shutil.which(name) is None]
    if tools:
        return f"{', '.join(tools)} not found"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if subprocess.run(["unshare", "-n", "-u", "-m", "true"], check=False).returncode:
        return "may not make namespaces"
    return ""


class LabError(Exception):
    """This machine does not let the cluster start: a tool or a daemon refuses or never answers."""


@dataclass
class Lab:
    """The cluster. Use as a context manager.

    Attributes:
        folder: of its files.
        watched: more logs, whose ends the messages of failures show.
    """

    folder: Path
    watched: list[Path] = field(default_factory=list)
    _holders: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _server: ForkServer | None = None

    def __enter__(self) -> Lab:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, *command: str, host: str = "ctl", **options: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host of the lab and wait for it."""
        return subprocess.run(
            [*self._enter(host), *command],
            env=self._environment(options),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def controller(self) -> tuple[ForkServer, dict[str, str]]:
        """A fork server on the controller and the variables of a process there."""
        assert self._server, "the cluster has not started"
        return self._server, self._environment({"PYTHONWARNINGS": "ignore"})

    def fact(self, job: str, key: str) -> str:
        """What Slurm says of a job, as ``RUNNING`` of JobState; empty where it is unknown."""
        said = self.run("scontrol", "show", "job", "-o", job).stdout
        found = (word.partition("=") for word in said.split())
        return next((value for name, _, value in found if name == key), "")

    def state(self, job: str) -> str:
        """State of a job, as ``RUNNING``; empty where it is unknown."""
        return self.fact(job, "JobState")

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
        """Wait until ``condition`` holds.

        Raises:
            AssertionError: it does not in time; the message has the ends of the logs.
        """
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not in {seconds:.0f} s\n{self.logs()}"
            time.sleep(0.2)

    def _await(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait for a part of the cluster that starts.

        Raises:
            LabError: a process of the lab ended, or the part does not answer in time.
        """

        def holds() -> bool:
            try:
                return condition()
            except subprocess.TimeoutExpired:  # of a command that asks
                return False

        end = time.monotonic() + seconds
        while not holds():
            for name, process in [*self._holders.items(), *self._daemons.items()]:
                if (code := process.poll()) is not None:
                    raise LabError(f"{name} ended with code {code}\n{self._ends()}")
            if time.monotonic() >= end:
                raise LabError(f"{what}: no answer in {seconds:.0f} s\n{self._ends()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The queue and the ends of the daemons' logs."""
        said = [self.run("scontrol", "show", "job").stdout, self.run("sinfo").stdout]
        return "\n".join([*said, self._ends()])

    def _ends(self) -> str:
        """The ends of the daemons' logs and outputs."""
        said = []
        ours = [path for suffix in ("log", "out") for path in self.folder.glob(f"*.{suffix}")]
        for path in [*sorted(ours), *self.watched]:
            text = path.read_text(errors="replace") if path.exists() else ""
            lines = [line for line in text.splitlines() if "pmix" not in line][-15:]
            said.append("\n".join([f"== {path.name}", *lines]))
        return "\n".join(said)

    def kill_node(self, name: str) -> None:
        """The node dies: first its network, so that nobody hears of its end, then its processes.

        The controller's questions fail at once, as where a router knows that a host is gone. They
        would wait for a quarter of a minute otherwise.
        """
        self._ip(name, "link", "set", "eth0", "down")
        self._ip("ctl", "route", "add", "unreachable", ADDRESS[name])
        for pid in self._processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemons.pop(f"slurmd {name}").wait()

    def slow_down(self, name: str, rate: str = "5mbit") -> None:
        """Limit what a node sends: a step of the tiny model takes half a second then."""
        limit = ("tbf", "rate", rate, "burst", "64kbit", "latency", "1s")
        done = self.run("tc", "qdisc", "add", "dev", "eth0", "root", *limit, host=name)
        assert done.returncode == 0, done.stderr

    def start_node(self, name: str) -> None:
        """The node comes back, at full speed."""
        self.run("tc", "qdisc", "del", "dev", "eth0", "root", host=name)
        self.run("ip", "route", "del", "unreachable", ADDRESS[name])
        self._ip(name, "link", "set", "eth0", "up")
        self._daemon(f"slurmd {name}", name, "slurmd", "-D", "-N", name, *self._conf)

    def close(self) -> None:
        """End everything that the lab started."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
        if self._server is not None:
            self._server.close()
        hosts = [name for name in self._holders if self._holders[name].poll() is None]
        for name in hosts:
            for pid in self._processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in [*self._daemons.values(), *self._holders.values()]:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def _start(self) -> None:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(parents=True)
        for path in (self.folder, self.folder / "munge"):
            path.chmod(0o755)
        nodes = [
            f"NodeName={name} NodeAddr={ADDRESS[name]} NodeHostname={name} CPUs=2 RealMemory=4000"
            for name in NODES
        ]
        text = CONF.format(folder=self.folder, nodes="\n".join(nodes), **ADDRESS)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._join()
        # It imports while the daemons start and the test prepares its run.
        server_environment = {**child_environment(), **self._environment()}
        self._server = ForkServer(server_environment, self._enter("ctl"))
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge/{name}" for option, name in files.items()]
        self._daemon("munged", "ctl", "munged", "-F", "--force", f"--key-file={key}", *options)
        self._await(lambda: (self.folder / "munge/socket").exists(), "munged", 10)
        self._daemon("slurmctld", "ctl", "slurmctld", "-D", *self._conf)
        for name in NODES:
            self.start_node(name)
        idle = "idle 2\n"
        self._await(lambda: self.run("sinfo", "-h", "-o", "%t %D").stdout == idle, "nodes", 60)

    def _join(self) -> None:
        """Hosts with a network of their own, and a bridge on the controller between them."""
        for name in ADDRESS:
            command = [
                "unshare",
                "-n",
                "-u",
                "-m",
                "bash",
                "-c",
                f"hostname {name}; exec sleep inf",
            ]
            self._holders[name] = subprocess.Popen(command, start_new_session=True)
        self._await(
            lambda: all(
                self.run("hostname", host=name).stdout.strip() == name for name in self._holders
            ),
            "namespaces",
            10,
        )
        self._ip("ctl", "link", "add", "br0", "type", "bridge")
        for name in NODES:
            pid = str(self._holders[name].pid)
            self._ip(
                "ctl", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", pid
            )
            self._ip("ctl", "link", "set", name, "master", "br0", "up")
            self._ip(name, "addr", "add", f"{ADDRESS[name]}/24", "dev", "eth0")
            self._ip(name, "link", "set", "eth0", "up")
        self._ip("ctl", "addr", "add", f"{ADDRESS['ctl']}/24", "dev", "br0")
        self._ip("ctl", "link", "set", "br0", "up")
        for name in ADDRESS:
            self._ip(name, "link", "set", "lo", "up")

    @property
    def _conf(self) -> tuple[str, str]:
        return ("-f", str(self.folder / "slurm.conf"))

    def _ip(self, host: str, *words: str) -> None:
        done = self.run("ip", *words, host=host)
        if done.returncode:
            raise LabError(f"ip {' '.join(words)} on {host}: {done.stderr.strip()}")

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "-t", str(self._holders[host].pid), "-n", "-u", "-m"]

    def _environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        known = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        conf = str(self.folder / "slurm.conf")
        return {**known, "PATH": path, "SLURM_CONF": conf, "OMP_NUM_THREADS": "1", **(more or {})}

    def _daemon(self, name: str, host: str, *command: str) -> None:
        log = (self.folder / f"{name.replace(' ', '-')}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            [*self._enter(host), *command],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def _processes(self, host: str) -> list[int]:
        """The processes of a host but for the process that holds its namespaces."""
        holder = self._holders[host].pid
        network = os.readlink(f"/proc/{holder}/ns/net")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(path / "ns/net") == network and int(path.name) != holder:
                    found.append(int(path.name))
        return found
