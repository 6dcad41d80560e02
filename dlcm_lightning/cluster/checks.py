"""What is asked before the first step, and what follows from the answers: a mistake of the user ends the job with its
remedy; a bad node is left out of the next attempt. A node is bad where it has not answered, or found something that
most others have not, or is much slower than the median: one slow node makes all of them slow.

Ranks answer on their standard output, which srun carries to the job: that works where the file system or the network
is what is broken. The measuring itself is in training/preflight.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import MappingProxyType

from dlcm_lightning.config import Config
from dlcm_lightning.run_directory import CHECKPOINTS
from dlcm_lightning.scaling.memory import checkpoint_bytes, kept_bytes

MARK = "DLCM-CHECK "
"""Before an answer, among whatever else a rank prints."""
LONGEST_WORDS = 250
LOOK = "look at srun.txt of this attempt; is the environment there on this node?"
FOLLOWS = ("answer", "all-reduce", "rank 0")
"""What may be missing on a good node because of another."""
OF_THE_FIRST = ("shared directory", "first node")
"""What all nodes but the first find where the directory, or the address of the first, is at fault."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    good: bool
    said: str
    remedy: str = ""
    of_run: bool = False
    """Whether it is the same on all nodes and asked by one rank."""

    @property
    def certain(self) -> bool:
        """Whether it is a person's to mend where it is found on most nodes."""
        return self.of_run or self.what in ("tasks", *OF_THE_FIRST)


@dataclass(frozen=True)
class CheckResult:
    """Of one rank."""

    rank: int
    node: str
    findings: list[Finding] = field(default_factory=list)
    product_flops: float = 0.0
    """Rate of a large matrix product; 0 where it was not reached."""
    reduce_seconds: float = 0.0
    """Of an all-reduce within the node."""

    def lines(self) -> list[str]:
        """One a finding and one after them: srun breaks lines of more than a kilobyte and mixes them."""
        where = {"rank": self.rank, "node": self.node}
        found = [where | {"finding": {name: value[:LONGEST_WORDS] if isinstance(value, str) else value
                                      for name, value in asdict(finding).items()}} for finding in self.findings]
        closing = where | {"product_flops": self.product_flops, "reduce_seconds": self.reduce_seconds}
        return [MARK + json.dumps(one) for one in [*found, closing]]


def answers_in(text: bytes) -> list[CheckResult]:
    """Those that are complete, among whatever else ranks print."""
    findings: dict[int, list[Finding]] = {}
    answers: dict[int, CheckResult] = {}
    for line in text[:text.rfind(b"\n") + 1].decode(errors="replace").splitlines():
        if MARK not in line:
            continue
        said = json.loads(line.partition(MARK)[2])
        mine = findings.setdefault(said["rank"], [])
        if "finding" in said:
            mine.append(Finding(**said["finding"]))
        else:
            answers[said["rank"]] = CheckResult(findings=mine, **said)
    return list(answers.values())


@dataclass
class CheckSummary:
    """What the answers of all ranks come to."""

    rows: list[tuple[str, Finding]] = field(default_factory=list)
    """Where, and what."""
    bad_nodes: dict[str, str] = field(default_factory=dict)
    """And why."""
    mistakes: list[Finding] = field(default_factory=list)
    """What no other node would make better."""

    def table(self) -> list[str]:
        lines = [f"  {'where':<12}{'what':<22}{'':<5}found"]
        for where, one in self.rows:
            lines.append(f"  {where:<12}{one.what:<22}{'ok' if one.good else 'NO':<5}{one.said}")
            if one.remedy and not one.good:
                lines.append(f"  {'':<39}{one.remedy}")
        return lines


def judge(answers: Iterable[CheckResult], nodes: Sequence[str], tasks: int, slowest_share: float,
          ended: Mapping[str, str] = MappingProxyType({})) -> CheckSummary:
    """answers: those that came. tasks: of every node. ended: nodes whose tasks ended by themselves without one."""
    summary = CheckSummary()
    of_node: dict[str, list[CheckResult]] = {node: [] for node in nodes}
    for answer in answers:
        of_node.setdefault(answer.node, []).append(answer)
    for node, found in of_node.items():
        seen: set[Finding] = set()
        for answer in found:
            for finding in answer.findings:
                if finding not in seen:
                    seen.add(finding)
                    summary.rows.append((node, finding))
        if node in ended and len(found) < tasks:
            summary.rows.append((node, Finding("start", False, ended[node], LOOK)))
        elif len(found) < tasks:
            said = f"{tasks - len(found)} of {tasks} ranks did not answer"
            summary.rows.append((node, Finding("answer", False, said, LOOK)))
    summary.rows += _speeds(of_node, slowest_share)
    failed = [(node, finding) for node, finding in summary.rows if not finding.good]
    if of_run := [finding for _, finding in failed if finding.of_run]:
        summary.mistakes = of_run
        return summary
    causes = [one for one in failed if one[1].what not in FOLLOWS]
    silent = [one for one in failed if one[1].what == "answer"]
    blamed: dict[str, Finding] = {}
    for node, finding in causes or silent or failed:
        blamed.setdefault(node, finding)
    if _are_bad(blamed, nodes):
        summary.bad_nodes = {node: f"{finding.what}: {finding.said}" for node, finding in blamed.items()}
    else:
        summary.mistakes = list(blamed.values())
    return summary


def _are_bad(blamed: Mapping[str, Finding], nodes: Sequence[str]) -> bool:
    """Whether other nodes would do better than those that are blamed."""
    if len(nodes) == 1:
        return not any(finding.certain for finding in blamed.values())
    all_but_the_first = set(nodes[1:]) <= set(blamed)
    if all_but_the_first and all(finding.what in OF_THE_FIRST for finding in blamed.values()):
        return False
    return 2 * len(blamed) <= len(nodes)


def _speeds(of_node: dict[str, list[CheckResult]], slowest_share: float) -> Iterator[tuple[str, Finding]]:
    """A node is as fast as its slowest rank."""
    products = {node: min(answer.product_flops for answer in found) for node, found in of_node.items() if found}
    reduces = {node: max(answer.reduce_seconds for answer in found) for node, found in of_node.items() if found}
    for what, rates, unit, scale in (
        ("matrix products", products, "TFLOP/s", 1e-12),
        ("all-reduce", {node: 1 / seconds for node, seconds in reduces.items() if seconds}, "a second", 1.0),
    ):
        measured = {node: rate for node, rate in rates.items() if rate}
        if not measured:
            continue
        middle = median(measured.values())
        for node, rate in measured.items():
            slow = rate < slowest_share * middle
            finding = Finding(what, not slow, f"{rate * scale:,.3g} {unit}, {rate / middle:.2f} of the median")
            yield node, finding


def room(config: Config, run: Path, runs: int = 1) -> Finding:
    """Whether the checkpoints of so many runs like this will find room; what they take already counts as free. A quota
    that the file system does not show is not seen."""
    there = next(folder for folder in (run, *run.resolve().parents) if folder.exists())
    used = sum(file.stat().st_size for file in (run / CHECKPOINTS).rglob("*") if file.is_file())
    free, needed = shutil.disk_usage(there).free + used, runs * kept_bytes(config)
    said = f"{free / 1e9:,.1f} GB for {needed / 1e9:,.1f} GB of checkpoints of {checkpoint_bytes(config) / 1e9:,.2f}"
    return Finding("room", free >= needed, said, "free space, choose another train.output_dir=..., or keep fewer: "
                                                 "train.keep_last, train.keep_every_tokens", of_run=True)
