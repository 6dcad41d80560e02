"""A real SLURM on one machine: controller, authentication and a daemon a node, each node a set of Linux namespaces with
its own host name, address, process table and /dev/shm. The file system is shared, as on a cluster with a parallel one.

    with MiniCluster(Path("/tmp/mini"), nodes=2, gpus=2) as cluster:
        cluster.call("sbatch", "job.sh")

Needs root, `ip`, `unshare` and either an installed SLURM or Debian's packages, which are fetched and unpacked aside
(nothing is installed). Where one of these is missing, `why_not` says which. `python -m tests.slurm.mini_cluster FOLDER`
keeps one up until Ctrl-C and prints what to export.

GPUs are claimed, not there: SLURM counts and hands them out, and torch finds none.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlcm-lightning" / "slurm"
START_SECONDS = 40.0
LONGEST_PATH = 60
"""Of the folder: sockets below it have 108 bytes for their whole path."""

SETTINGS = """\
ClusterName=mini
SlurmctldHost={host}({prefix}.1)
SlurmctldPort={port}
SlurmdPort={daemon_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
PlugStackConfig={folder}/plugstack.conf
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_resolution=1,bf_continue,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
MinJobAge=600
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
InactiveLimit=0
UnkillableStepTimeout=60
GresTypes=gpu
{plugins}
{nodes}
PartitionName=train Nodes=ALL Default=YES MaxTime=7-0 DefaultTime=1:00:00 PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={grace} State=UP
PartitionName=urgent Nodes=ALL MaxTime=7-0 DefaultTime=1:00:00 PriorityTier=100 PreemptMode=OFF State=UP
"""

NODE = """\
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 shm /dev/shm
"$3" -D -N "$1" -f "$2/slurm.conf" $4 & daemon=$!
trap 'kill $daemon' TERM
while kill -0 $daemon 2>/dev/null; do wait $daemon; done
"""
"""What the first process of a node does; it reaps orphans, and its end is the end of the node."""


class NoCluster(RuntimeError):
    """SLURM cannot be had here. Says why."""


def why_not() -> str:
    """What is missing for a cluster, or nothing."""
    if os.geteuid() != 0:
        return "a real SLURM with namespaces needs root"
    for tool in ("ip", "unshare", "bash"):
        if shutil.which(tool) is None:
            return f"a real SLURM with namespaces needs {tool}"
    space, bridge = "mini-probe", "miniprobe"
    for probe in (["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "true"],
                  ["ip", "netns", "add", space], ["ip", "netns", "del", space],
                  ["ip", "link", "add", bridge, "type", "bridge"], ["ip", "link", "del", bridge]):
        if subprocess.run(probe, capture_output=True).returncode:
            return f"namespaces are refused here: {' '.join(probe)}"
    try:
        binaries()
    except NoCluster as error:
        return str(error)
    return ""


def binaries() -> tuple[Path | None, Path | None]:
    """Folders of commands and of plugins of the unpacked packages; (None, None) where SLURM is installed."""
    if all(shutil.which(command) for command in ("slurmctld", "slurmd", "sbatch", "munged")):
        return None, None
    commands = CACHE / "bin"
    if not (commands / "slurmctld").is_file():
        _unpack()
    return commands, next((CACHE / "root/usr/lib").glob("*-linux-gnu/slurm-wlm"))


def _unpack() -> None:
    """Fetches the packages and what they need, and unpacks them aside. Each command runs through the loader with its
    own libraries, so that none of them leaks into the environment of jobs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt fetches as a user of its own

        def listed() -> list[str]:
            planned = subprocess.run(["apt-get", "install", "-s", "--no-install-recommends", *PACKAGES],
                                     capture_output=True, text=True, cwd=folder)
            return [line.split()[1] for line in planned.stdout.splitlines() if line.startswith("Inst ")]

        def fetched() -> bool:
            wanted = listed()
            return bool(wanted) and not subprocess.run(["apt-get", "download", "-q", *wanted], cwd=folder,
                                                       capture_output=True).returncode

        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise NoCluster("neither SLURM nor apt-get, which would fetch it")
        if not fetched():
            subprocess.run(["apt-get", "update", "-q"], capture_output=True)
            if not fetched():
                raise NoCluster(f"the packages {', '.join(PACKAGES)} cannot be fetched")
        root = CACHE / "root"
        shutil.rmtree(CACHE, ignore_errors=True)
        root.mkdir(parents=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    libraries = next((root / "usr/lib").glob("*-linux-gnu"))
    loader = next(path for path in (Path("/lib64/ld-linux-x86-64.so.2"), Path("/lib/ld-linux-aarch64.so.1"))
                  if path.exists())
    commands = CACHE / "bin.unfinished"
    commands.mkdir()
    for program in [*(root / "usr/bin").iterdir(), *(root / "usr/sbin").iterdir()]:
        called = program.name.removesuffix("-wlm")
        file = commands / called
        file.write_text(f"#!/bin/sh\nexec {loader} --library-path {libraries}/slurm-wlm:{libraries} --argv0 {called} "
                        f'{program} "$@"\n')
        file.chmod(0o755)
    commands.rename(CACHE / "bin")


class MiniCluster:
    """A context manager: up when it is entered, without a trace when it is left."""

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 2, cpus: int = 64, *, grace: int = 10,
                 kill_wait: int = 5, number: int = 0) -> None:
        """grace: seconds between the notice of a preemption and its end; kill_wait: between SIGTERM and SIGKILL.
        number: tells clusters of one machine apart."""
        if len(str(folder)) > LONGEST_PATH:
            raise ValueError(f"{folder}: at most {LONGEST_PATH} characters, or its sockets cannot be named")
        self.folder, self.gpus, self.cpus = folder, gpus, cpus
        self.names = [f"n{index}" for index in range(1, nodes + 1)]
        self.grace, self.kill_wait = grace, kill_wait
        self.prefix, self.bridge, self.port = f"10.87.{number}", f"mini{number}", 17900 + 2 * number
        self.commands, self.plugins = binaries()
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    # What a user of the cluster does

    @property
    def environment(self) -> dict[str, str]:
        """Of a login node."""
        found = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        path = f"{self.commands}:{found['PATH']}" if self.commands else found["PATH"]
        return {**found, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str, cwd: Path | None = None, check: bool = True, seconds: float = 60.0,
             **variables: str) -> str:
        """Output of a command on the login node; both streams. AssertionError: it fails."""
        done = subprocess.run(command, cwd=cwd, env=self.environment | variables, text=True, timeout=seconds,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def job(self, identity: str) -> dict[str, str]:
        """`scontrol show job`."""
        shown = self.call("scontrol", "show", "job", "--oneliner", identity)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    # What happens to it

    def crash(self, node: str) -> None:
        """Power failure: every process of the node is gone at once."""
        self._end(node, signal.SIGKILL)

    def boot(self, node: str) -> None:
        """Starts a node, once more after a crash."""
        space = f"{self.bridge}-{node}"
        daemon = self._program("slurmd")
        helper = f"-d {self._program('slurmstepd')}" if self.commands else ""
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        self._start(node, "ip", "netns", "exec", space, "unshare", "--uts", "--mount", "--ipc", "--pid", "--fork",
                    "--kill-child=KILL", "--mount-proc", "bash", "-c", NODE, "init", node, str(self.folder), daemon,
                    helper)

    def network(self, node: str, up: bool) -> None:
        """Cuts or restores a node's cable."""
        self._ip("link", "set", f"{self.bridge}-v{node[1:]}", "up" if up else "down")

    # Coming and going

    def __enter__(self) -> MiniCluster:
        try:
            self._configure()
            self._wire()
            self._start("slurmctld", self._program("slurmctld"), "-D", "-f", str(self.folder / "slurm.conf"))
            for node in self.names:
                self.boot(node)
            self._await_nodes()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._leave()

    def _configure(self) -> None:
        folder = self.folder
        for name in ("munge", "state", "log", "spool", "dev"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "munge").chmod(0o755)
        key = folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = os.uname().nodename.split(".")[0]
        hosts = ["127.0.0.1 localhost", f"{self.prefix}.1 {host} login"]
        hosts += [f"{self._address(node)} {node}" for node in self.names]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # there is no DNS to ask
        (folder / "plugstack.conf").touch()
        # Named, or slurmd looks for a hierarchy of cgroups that a container does not have.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\n"
                                            "ConstrainRAMSpace=no\nConstrainDevices=no\n")
        for number in range(self.gpus):
            (folder / f"dev/nvidia{number}").touch()
        devices = f"{folder}/dev/nvidia[0-{self.gpus - 1}]" if self.gpus > 1 else f"{folder}/dev/nvidia0"
        (folder / "gres.conf").write_text(f"Name=gpu File={devices}\n" if self.gpus else "")
        claimed = f"CPUs={self.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 " \
                  f"RealMemory=1000000 {f'Gres=gpu:{self.gpus} ' if self.gpus else ''}State=UNKNOWN"
        nodes = "\n".join(f"NodeName={node} NodeHostname={node} NodeAddr={self._address(node)} {claimed}"
                          for node in self.names)
        (folder / "slurm.conf").write_text(SETTINGS.format(
            host=host, prefix=self.prefix, port=self.port, daemon_port=self.port + 1, folder=folder, nodes=nodes,
            plugins=f"PluginDir={self.plugins}" if self.plugins else "", grace=self.grace, kill_wait=self.kill_wait))
        self._start("munged", self._program("munged"), "--foreground", f"--key-file={key}",
                    f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid",
                    f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed")

    def _wire(self) -> None:
        """A bridge, and for each node a cable to it."""
        self._unwire()
        self._ip("link", "add", self.bridge, "type", "bridge")
        self._ip("addr", "add", f"{self.prefix}.1/24", "dev", self.bridge)
        self._ip("link", "set", self.bridge, "up")
        for node in self.names:
            space, cable = f"{self.bridge}-{node}", f"{self.bridge}-v{node[1:]}"
            self._ip("netns", "add", space)
            self._ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("link", "set", cable, "master", self.bridge, "up")
            self._ip("-n", space, "link", "set", "lo", "up")
            self._ip("-n", space, "addr", "add", f"{self._address(node)}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")

    def _unwire(self) -> None:
        for node in self.names:  # a namespace is freed late and would keep the cable's name until then
            self._ip("link", "del", f"{self.bridge}-v{node[1:]}", check=False)
            self._ip("netns", "del", f"{self.bridge}-{node}", check=False)
        self._ip("link", "del", self.bridge, check=False)

    def _await_nodes(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            idle = self.call("sinfo", "-h", "-N", "-p", "train", "-t", "idle", "-o", "%N", check=False).split()
            if set(self.names) <= set(idle):
                return
            if self._running["slurmctld"].poll() is not None:
                break
            time.sleep(0.1)
        logs = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}"
                         for log in sorted((self.folder / "log").iterdir()))
        raise NoCluster(f"the cluster does not come up in {START_SECONDS:g} s\n{logs}")

    def _leave(self) -> None:
        for name in [*self.names, "slurmctld", "munged"]:
            self._end(name, signal.SIGTERM if name == "slurmctld" else signal.SIGKILL)
        self._unwire()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _program(self, name: str) -> str:
        return str(self.commands / name) if self.commands else str(shutil.which(name))

    def _address(self, node: str) -> str:
        return f"{self.prefix}.{int(node[1:]) + 10}"

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._running[name] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                                   env=self.environment, start_new_session=True)

    def _end(self, name: str, number: int) -> None:
        process = self._running.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @staticmethod
    def _ip(*arguments: str, check: bool = True) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if check and done.returncode:
            raise NoCluster(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def main() -> None:
    """Keeps a cluster up until Ctrl-C."""
    if reason := why_not():
        sys.exit(reason)
    nodes, gpus = (int(word) for word in (sys.argv[2:] + ["2", "2"][len(sys.argv) - 2:])[:2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with MiniCluster(Path(sys.argv[1]), nodes, gpus, number=9) as cluster:
        found = cluster.environment
        print(f"export PATH={found['PATH']} SLURM_CONF={found['SLURM_CONF']}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
