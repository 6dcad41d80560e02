"""What follows an attempt, and what follows from the answers of nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.cluster.attempts import Attempt, How, Outcome, fruitless_in_a_row, load_attempts, save_attempts
from dlcm_lightning.cluster.checks import CheckResult, CheckSummary, Finding, answers_in, judge, room
from dlcm_lightning.cluster.excluded_nodes import load_exclusions, record_exclusions, to_leave_out
from dlcm_lightning.cluster.requeue import decide_requeue
from dlcm_lightning.cluster.srun import complaints_in
from dlcm_lightning.cluster.supervisor import Supervisor
from dlcm_lightning.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig
from dlcm_lightning.scaling.memory import kept_bytes


def attempt(how: How, before: int = 10, after: int | None = 10) -> Attempt:
    return Attempt("7", "now", ["n1"], before, after, "now", how, "why")


@pytest.mark.parametrize(("how", "stop", "may_go_on", "fruitless", "action", "code"), [
    ("finished", False, True, 0, "end", 0),
    ("refused", False, True, 0, "end", 2),
    ("stopped", True, True, 0, "end", 0),
    ("stopped", False, True, 0, "again", 0),
    ("stopped", False, False, 0, "leave", 0),  # cancelled, or requeued by hand: SLURM decides
    ("taken", False, False, 0, "leave", 0),
    ("taken", False, True, 0, "again", 0),  # out of time
    ("crashed", False, True, 2, "again", 0),
    ("crashed", False, True, 3, "end", 3),
    ("hung", False, True, 3, "end", 3),
    ("crashed", False, False, 3, "leave", 0),
])
def test_what_follows_a_life(how: How, stop: bool, may_go_on: bool, fruitless: int, action: str, code: int) -> None:
    decision = decide_requeue(attempt(how), stop, may_go_on, fruitless, 3)
    assert (decision.action, decision.code) == (action, code)


def test_only_bad_ends_without_a_newer_checkpoint_are_counted() -> None:
    assert fruitless_in_a_row([]) == 0
    assert fruitless_in_a_row([attempt("crashed"), attempt("hung"), attempt("vanished"), attempt("unfit")]) == 4
    assert fruitless_in_a_row([attempt("crashed"), attempt("crashed", 10, 20), attempt("hung", 20, 20)]) == 1
    assert fruitless_in_a_row([attempt("crashed"), attempt("taken")]) == 0
    assert fruitless_in_a_row([attempt("crashed"), attempt("stopped", 10, 10)]) == 0
    assert attempt("vanished", 10, None).fruitless


def test_a_time_limit_that_is_too_short_for_a_step_is_not_tried_for_ever() -> None:
    short = [replace(attempt(how, 10, 10), out_of_time=True) for how in ("taken", "stopped", "taken")]
    assert fruitless_in_a_row(short) == 3
    assert decide_requeue(short[-1], False, True, 3, 3).action == "end"
    assert fruitless_in_a_row([*short, replace(attempt("stopped", 10, 12), out_of_time=True)]) == 0


def test_lives_and_outcomes_survive_as_files(tmp_path: Path) -> None:
    assert load_attempts(tmp_path) == [] and Outcome.load(tmp_path) is None
    attempts = [attempt("crashed"), replace(attempt("stopped"), decision="again")]
    save_attempts(tmp_path, attempts)
    assert load_attempts(tmp_path) == attempts
    Outcome("stopped", "SIGTERM").save(tmp_path)
    assert Outcome.load(tmp_path) == Outcome("stopped", "SIGTERM")


NODES = ["n1", "n2", "n3", "n4"]
BAD = Finding("device", False, "gone", "mend it")


def answers(**changed: list[CheckResult]) -> list[CheckResult]:
    good = {node: [CheckResult(2 * index, node, [Finding("device", True, "there")], 1e12, 0.01),
                   CheckResult(2 * index + 1, node, [], 1.1e12, 0.01)] for index, node in enumerate(NODES)}
    return [answer for found in {**good, **changed}.values() for answer in found]


def test_good_answers_leave_nothing_to_say() -> None:
    summary = judge(answers(), NODES, 2, 0.5)
    assert not summary.bad_nodes and not summary.mistakes
    assert all(finding.good for _, finding in summary.rows)


def test_a_node_that_fails_alone_is_bad_and_what_all_find_is_a_mistake() -> None:
    one = judge(answers(n2=[CheckResult(2, "n2", [BAD]), CheckResult(3, "n2")]), NODES, 2, 0.5)
    assert one.bad_nodes == {"n2": "device: gone"} and not one.mistakes
    everyone = judge([CheckResult(rank, node, [BAD]) for rank, node in enumerate(NODES)], NODES, 1, 0.5)
    assert not everyone.bad_nodes and everyone.mistakes[0] == BAD


def test_a_cause_is_blamed_even_where_what_follows_from_it_was_noticed_first() -> None:
    found = [CheckResult(0, "n1", [Finding("all-reduce", False, "timed out"), BAD]),
             CheckResult(1, "n2", [Finding("all-reduce", False, "timed out")])]
    assert judge(found, ["n1", "n2"], 1, 0.5).bad_nodes == {"n1": "device: gone"}


def test_what_one_rank_found_of_the_run_is_a_mistake_and_no_node_is_blamed() -> None:
    full = Finding("room", False, "none", "make some", of_run=True)
    summary = judge([CheckResult(0, "n1", [BAD, full])], NODES, 1, 0.5)
    assert not summary.bad_nodes and summary.mistakes == [full]


def test_a_node_that_does_not_answer_is_blamed_and_not_those_that_waited_for_it() -> None:
    waited = Finding("all-reduce", False, "timed out")
    found = [CheckResult(rank, node, [waited]) for rank, node in enumerate(NODES) if node != "n3"]
    assert list(judge(found, NODES, 1, 0.5).bad_nodes) == ["n3"]


def test_a_node_whose_tasks_ended_at_once_is_blamed_before_those_that_were_ended_while_they_waited() -> None:
    summary = judge([], ["n1", "n2"], 2, 0.5, {"n2": "tasks 2-3: Exited with exit code 1"})
    assert summary.bad_nodes == {"n2": "start: tasks 2-3: Exited with exit code 1"} and not summary.mistakes


def test_a_slow_node_is_bad_and_slow_nodes_among_equals_are_not() -> None:
    slow = judge(answers(n4=[CheckResult(6, "n4", [], 1e12, 0.01), CheckResult(7, "n4", [], 0.4e12, 0.01)]), NODES, 2,
                 0.5)
    assert list(slow.bad_nodes) == ["n4"] and "0.40 of the median" in slow.bad_nodes["n4"]
    wire = judge(answers(n1=[CheckResult(0, "n1", [], 1e12, 0.03), CheckResult(1, "n1", [], 1e12, 0.01)]), NODES, 2,
                 0.5)
    assert list(wire.bad_nodes) == ["n1"]
    assert not judge(answers(n4=[CheckResult(6, "n4", [], 0.4e12, 0.01), CheckResult(7, "n4", [], 1e12, 0.01)]), NODES,
                     2,
                     0.0).bad_nodes


def test_a_single_node_is_left_out_for_what_is_its_own_and_not_for_a_mistake() -> None:
    assert list(judge([CheckResult(0, "n1", [BAD])], ["n1"], 1, 0.5).bad_nodes) == ["n1"]
    asked = Finding("tasks", False, "two", "one")
    summary = judge([CheckResult(0, "n1", [asked])], ["n1"], 1, 0.5)
    assert not summary.bad_nodes and summary.mistakes == [asked] and asked.certain and not BAD.certain


def test_what_all_but_the_first_node_find_is_the_first_ones_fault() -> None:
    for what in ("shared directory", "first node"):
        blind = Finding(what, False, "not seen")
        found = [CheckResult(0, "n1", [Finding(what, True, "seen")]), CheckResult(1, "n2", [blind])]
        summary = judge(found, ["n1", "n2"], 1, 0.5)
        assert not summary.bad_nodes and summary.mistakes == [blind]
    some = judge(answers(n3=[CheckResult(4, "n3", [blind]), CheckResult(5, "n3")]), NODES, 2, 0.5)
    assert list(some.bad_nodes) == ["n3"]


def test_answers_are_found_among_what_ranks_print_when_they_are_complete() -> None:
    answer, other = CheckResult(3, "n2", [BAD, BAD], 1.0, 2.0), CheckResult(0, "n1", [Finding("x", True, "y" * 5000)])
    mixed = [line for pair in zip(answer.lines(), [*other.lines(), "a warning"], strict=True) for line in pair]
    text = "\n".join(mixed) + "\n"
    found = {one.rank: one for one in answers_in(text.encode())}
    assert found[3] == answer and found[0].findings[0].said in "y" * 5000
    assert max(len(line) for line in other.lines()) < 1024
    assert answers_in(text[:-20].encode()) != answers_in(text.encode())


def test_room_counts_the_checkpoints_that_are_there_and_will_be(tmp_path: Path) -> None:
    data = DataConfig(sources=[SourceConfig("a", "en", 1.0)], sequence_length=100, global_batch_size=10)
    small = ModelConfig(vocab_size=300, d_token=32, d_concept=64, encoder_layers=1, backbone_layers=1,
                        decoder_layers=1, heads_token=2, kv_heads_token=1, heads_concept=4, kv_heads_concept=2,
                        head_dim=16, ffn_token=64, ffn_concept=64)
    config = Config(name="x", model=small, data=data, train=TrainConfig(keep_last=2))
    assert room(config, tmp_path / "runs/x").good
    good = replace(config, train=TrainConfig(keep_every_tokens=10**9))
    assert kept_bytes(good) == kept_bytes(config) // 3 * (3 + 1000)
    wrong = replace(config, train=TrainConfig(keep_last=10**9))
    assert not room(wrong, tmp_path).good and "keep_last" in room(wrong, tmp_path).remedy


# What srun printed when a node could not launch its tasks after a hang; the other one was well.
LAUNCH_FAILED = """\
srun: error: Task launch for StepId=1.0 failed on node n2: Zero Bytes were transmitted or received
srun: error: Application launch failed: Zero Bytes were transmitted or received
srun: Job step aborted: Waiting up to 12 seconds for job step to finish.
slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-01-01T10:00:00 ***
srun: error: n1: tasks 0-1: Killed
"""


@pytest.mark.parametrize(("said", "blamed"), [
    (LAUNCH_FAILED, {"n2": "launch failed: Zero Bytes were transmitted or received"}),
    ("srun: error: n2: tasks 2-3: Exited with exit code 1\nsrun: error: n1: tasks 0-1: Terminated\n",
     {"n2": "tasks 2-3: Exited with exit code 1"}),
    ("srun: error: n1: tasks 0-1: Terminated\nsrun: error: n2: task 2: Exited with exit code 137\n"
     "srun: Job step aborted: Waiting up to 12 seconds for job step to finish.\n", {}),
    ("srun: error: n2: task 3: Killed\n", {"n2": "task 3: Killed"}),  # as when its memory is full
    ("srun: error: n[1-2]: tasks 0-3: Exited with exit code 2\n", {"n[1-2]": "tasks 0-3: Exited with exit code 2"}),
    ("srun: warning: can't honor --ntasks-per-node\n", {}),
])
def test_a_node_is_blamed_for_what_is_its_own_and_not_for_what_srun_killed(said: str, blamed: dict[str, str]) -> None:
    assert dict(complaints_in(said)) == blamed


def looked(monkeypatch: pytest.MonkeyPatch, *verdicts: CheckSummary) -> tuple[CheckSummary, dict[str, list[str]]]:
    """What two looks come to; no third one is there."""
    job, looks = object.__new__(Supervisor), iter(verdicts)
    job.attempts, job.signals = [], []
    monkeypatch.setattr(Supervisor, "_check", lambda self: next(looks))
    return job._check_twice()


def test_nobody_is_left_out_for_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    good, once = CheckSummary(), CheckSummary(bad_nodes={"n2": "launch failed"})
    again = CheckSummary(bad_nodes={"n2": "too slow"})
    assert looked(monkeypatch, good) == (good, {})
    assert looked(monkeypatch, once, good) == (good, {})
    summary, evidence = looked(monkeypatch, once, again)
    assert summary.bad_nodes == {"n2": "too slow"} and evidence == {"n2": ["launch failed", "too slow"]}
    summary, evidence = looked(monkeypatch, CheckSummary(bad_nodes={"n1": "x", "n2": "y"}), again)
    assert list(summary.bad_nodes) == ["n2"] and list(evidence) == ["n2"]
    summary, evidence = looked(monkeypatch, CheckSummary(bad_nodes={"n1": "killed"}), again)
    assert not summary.bad_nodes and not evidence and summary.mistakes[0].what == "nodes"
    refused = CheckSummary(mistakes=[BAD])
    assert looked(monkeypatch, once, refused) == (refused, {})


def test_a_node_is_left_out_with_its_evidence_until_its_time_is_over(tmp_path: Path) -> None:
    assert to_leave_out(tmp_path, ["n9"], 0.0, 24) == ["n9"]
    record_exclusions(tmp_path, {"n2": ["launch failed", "too slow"]}, 1000.0)
    record_exclusions(tmp_path, {"n3": ["gone", "gone"]}, 1000.0 + 12 * 3600)
    assert [(one.node, one.evidence) for one in load_exclusions(tmp_path)] == [
        ("n2", ["launch failed", "too slow"]), ("n3", ["gone", "gone"])]
    hour = 3600.0
    assert to_leave_out(tmp_path, ["n9"], 1000 + 13 * hour, 24) == ["n9", "n2", "n3"]
    assert to_leave_out(tmp_path, ["n9", "n2", "n3"], 1000 + 25 * hour, 24) == ["n9", "n3"]
    assert to_leave_out(tmp_path, ["n2", "n3"], 1000 + 99 * hour, 24) == []
    assert to_leave_out(tmp_path, [], 1000 + 9999 * hour, 0) == ["n2", "n3"]
