"""`dlcm doctor`: what would go wrong later, asked now. By hand on any machine, and on every rank before the first step
of a job, where it costs seconds and saves the hours after which one slow or blind node would have been noticed.

Of the run, asked by the first rank: versions, room for checkpoints, whether the directory can be written, shards and
tokenizer against the configuration. Of each node, asked by all ranks: whether it sees the run's directory, reaches the
first node, has a device for every rank; how fast it multiplies, and how fast its ranks sum.

Nothing waits for ever. Others call the first rank under the address that the run will use: where that machine answers
that nobody listens, they call again until it does; where no machine answers, the address is wrong.
"""

from __future__ import annotations

import datetime
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from dlcm_lightning.cluster.attempts import this_attempt
from dlcm_lightning.cluster.checks import CheckResult, Finding, judge, room
from dlcm_lightning.cluster.supervisor import TOKEN
from dlcm_lightning.cluster.world import World, configure_world, gpus_of_node, node_name
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import DataError
from dlcm_lightning.ops.device import DEVICE
from dlcm_lightning.progress import Log
from dlcm_lightning.training.device import (
    choose_device,
    describe_hardware,
    matrix_product_rate,
    resolve_precision,
)

CALL_SECONDS = 10.0
"""Until a call to the first node that is not answered counts as none."""
SEEN_SECONDS = 10.0
"""Until a file of another node has to be seen."""
REDUCED_NUMBERS = 2**22
PRODUCT_SECONDS = 0.3
DISTRIBUTION = "dlcm-lightning"
BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
MOST_SHOWN = 6


def examine(config: Config, log: Log) -> bool:
    """By hand: this machine and this run; the table is reported. Whether everything is good."""
    findings, rate, node = [*of_run(config), of_device(config, World())], 0.0, node_name()
    if findings[-1].good:
        where = choose_device()
        rate = matrix_product_rate(resolve_precision(config.train.precision, where)[0], where, PRODUCT_SECONDS)
    verdict = judge([CheckResult(0, node, findings, rate)], [node], 1, config.job.slowest_share)
    for line in verdict.table():
        log(line)
    return not verdict.mistakes


def answer_in_job(config_file: str) -> CheckResult:
    """Of this rank, before the first step of a job."""
    attempt = this_attempt()
    assert attempt is not None
    rank, node = int(os.environ["SLURM_PROCID"]), node_name()
    findings = [of_shared(attempt)]
    answer = CheckResult(rank, node, findings)
    if not findings[0].good:
        return answer
    try:
        config, world = configure_world(load_config(config_file))
    except ConfigError as error:
        findings.append(Finding("tasks", False, str(error)))
        return answer
    with listening() if rank == 0 and config.train.ranks > 1 else nullcontext():
        if rank:
            findings.append(of_first_node(60 * config.job.check_minutes / 2))
        else:
            findings += of_run(config)
        findings.append(of_device(config, world))
        if not all(finding.good for finding in findings):
            return answer
        where = choose_device(world)
        rate = matrix_product_rate(resolve_precision(config.train.precision, where)[0], where, PRODUCT_SECONDS)
        seconds, reduced = of_reduce(rank, config, where)
    return CheckResult(rank, node, [*findings, *reduced], rate, seconds)


def of_run(config: Config) -> list[Finding]:
    """What is the same on all nodes."""
    run = Path(config.train.output_dir) / config.name
    found = [*of_versions(config), of_directory(run), room(config, run), of_data(config)]
    return [replace(finding, of_run=True) for finding in found]


def of_versions(config: Config) -> Iterator[Finding]:
    """What is installed against what this package says it works with, versions left out for a reason included."""
    extras = [extra for extra, wanted in {"gpu": config.model.attention == "flash",
                                          "flash4": config.model.attention == "flash4",
                                          "deepspeed": config.train.strategy.startswith("zero")}.items() if wanted]
    found, wrong = [], []
    try:
        requirements = [Requirement(one) for one in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:  # a container that is given this package as a folder
        yield Finding("versions", True, f"not compared: {DISTRIBUTION} is not installed here, only its folder is")
        return
    for requirement in requirements:
        if requirement.marker and not any(requirement.marker.evaluate({"extra": one}) for one in ("", *extras)):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        found.append(f"{requirement.name} {there}")
        if not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there} is not {requirement.specifier}")
    what = f"[{','.join(extras)}]" if extras else ""
    yield Finding("versions", not wrong, "; ".join(wrong) or ", ".join(found[:MOST_SHOWN]),
                  f"in the environment of the job: pip install -c constraints.txt -e '.{what}'")


def of_directory(run: Path) -> Finding:
    """Whether this process may write there."""
    probe = run / f".probe-{secrets.token_hex(4)}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return Finding("run directory", False, f"{run}: {error}", "correct the permissions, or choose another "
                                                                  "train.output_dir=...")
    return Finding("run directory", True, f"{run} can be written")


def of_data(config: Config) -> Finding:
    """Manifests, tokenizer and length of the mixture; every byte is compared by `dlcm data verify`."""
    said: list[str] = []
    try:
        reader = Reader(config.data, config.seed, config.model.vocab_size, verify_all=False, log=said.append)
        reader.check_lasts(config.total_steps * config.data.global_batch_size)
    except DataError as error:
        if config.data.corpus == "sample":
            return Finding("data", True, "the sample corpus is not there; the start, or dlcm prepare, fetches it")
        return Finding("data", False, str(error), "dlcm data inspect shows the mixture")
    tokens = reader.config.tokens_per_step * config.total_steps
    return Finding("data", True, "; ".join([f"{len(reader.sources)} sources last for {tokens:,} tokens", *said]))


def of_device(config: Config, world: World) -> Finding:
    """A rank and its device."""
    try:
        where = choose_device(world)
        if config.train.precision != "auto":
            resolve_precision(config.train.precision, where)
    except ConfigError as error:
        return Finding("device", False, str(error))
    if where.type == "cpu":
        missing = gpus_of_node() > 0 and os.environ.get(DEVICE) != "cpu"
        return Finding("device", not missing, f"no GPU: {describe_hardware(config.train, where)}",
                       "SLURM has given GPUs, torch finds none: driver and torch's CUDA have to agree; a cluster that "
                       f"only claims GPUs says {DEVICE}=cpu in slurm/site.sh")
    return Finding("device", True, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(where)}")


def of_shared(attempt: Path) -> Finding:
    """Whether this node sees what the first node has written."""
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        try:
            if (attempt / TOKEN).read_text():
                return Finding("shared directory", True, "seen by this node")
        except OSError:
            pass
        if time.monotonic() > deadline:
            return Finding("shared directory", False, f"{attempt / TOKEN} is not seen by this node",
                           "train.output_dir has to be on a file system that all nodes share, and be mounted there")
        time.sleep(0.2)


def of_first_node(patience: float) -> Finding:
    """Whether this rank reaches rank 0 under the address that the run will use. patience: seconds that rank 0 is given
    to come up."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1)
    began = time.monotonic()
    while True:
        try:
            with socket.create_connection(address, CALL_SECONDS):
                return Finding("first node", True, f"{address[0]} answers")
        except ConnectionRefusedError:
            if time.monotonic() > began + patience:
                return Finding("rank 0", False, f"did not come up in {patience:.0f} s", "see what srun said of it")
            time.sleep(0.2)
        except OSError as error:
            if time.monotonic() > began + CALL_SECONDS:
                return Finding("first node", False, f"{address[0]} does not answer: {error}",
                               "name its address or the interface in slurm/site.sh: DLCM_MASTER_ADDR, "
                               "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME")
            time.sleep(0.5)


@contextmanager
def listening() -> Iterator[None]:
    """Rank 0, for as long as its own answer takes: the others call meanwhile, and all come to the all-reduce."""
    with socket.create_server(("", int(os.environ["MASTER_PORT"]) + 1), backlog=128, reuse_port=True) as server:

        def accept() -> None:
            with suppress(OSError):  # closed
                while True:
                    server.accept()[0].close()

        threading.Thread(target=accept, daemon=True).start()
        yield


def of_reduce(rank: int, config: Config, where: torch.device) -> tuple[float, list[Finding]]:
    """Seconds of an all-reduce among the ranks of this node, after one among all."""
    ranks, devices = config.train.ranks, config.train.devices
    if ranks == 1:
        return 0.0, []
    seconds = 0.0
    before = os.environ.get(BLOCKING)
    os.environ[BLOCKING] = "1"  # else NCCL ends this process when its time is up, and nobody learns why
    try:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", rank=rank, world_size=ranks,
                                timeout=datetime.timedelta(seconds=6 * CALL_SECONDS))  # at MASTER_ADDR, as the run will
        try:
            groups = [dist.new_group(list(range(first, first + devices))) for first in range(0, ranks, devices)]
            numbers = torch.ones(REDUCED_NUMBERS, device=where)
            dist.all_reduce(numbers)
            if numbers[0].item() != ranks:
                return 0.0, [Finding("all-reduce", False, f"the sum of {ranks} ones is {numbers[0].item():g}",
                                     "this network or this device computes wrongly")]
            if devices > 1:  # alone, a rank would time nothing
                seconds = min(_timed(numbers, groups[rank // devices], where) for _ in range(3))
        finally:
            dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        return 0.0, [Finding("all-reduce", False, str(error).partition("\n")[0],
                             "name the interface in slurm/site.sh: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME")]
    finally:
        if before is None:
            del os.environ[BLOCKING]
        else:
            os.environ[BLOCKING] = before
    return seconds, []


def _timed(numbers: torch.Tensor, group: dist.ProcessGroup, where: torch.device) -> float:
    dist.barrier(group)
    began = time.perf_counter()
    dist.all_reduce(numbers, group=group)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - began
