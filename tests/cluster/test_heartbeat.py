"""Who is silent for too long, and who of the silent is to blame."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from dlcm_lightning.cluster.heartbeat import HangDetector, HeartbeatWriter
from dlcm_lightning.config import JobConfig

JOB = JobConfig(heartbeat_seconds=5, step_minutes=1, data_minutes=2, start_minutes=10, save_minutes=30)


def say(folder: Path, rank: int, phase: str, step: int, silent: float, beat: int) -> None:
    said = {"rank": rank, "node": f"n{rank}", "phase": phase, "step": step, "silent": silent, "beat": beat}
    (folder / f"rank-{rank:05d}").write_text(json.dumps(said))


@pytest.fixture
def detector(tmp_path: Path) -> HangDetector:
    return HangDetector(tmp_path, 3, JOB, now=0.0)


def all_say(detector: HangDetector, now: float, *said: tuple[str, int, float], beat: int = 1) -> None:
    for rank, (phase, step, silent) in enumerate(said):
        say(detector.folder, rank, phase, step, silent, beat)
    detector.listen(now)


def test_nobody_is_blamed_within_the_limits_of_the_phases(detector: HangDetector) -> None:
    all_say(detector, 100.0, ("forward", 7, 59), ("data", 7, 119), ("save", 7, 1700))
    assert detector.hung(100.5) is None
    assert detector.hung(101.5) is not None  # forward may last a minute


def test_of_ranks_that_wait_for_each_other_the_one_behind_is_blamed(detector: HangDetector) -> None:
    all_say(detector, 100.0, ("backward", 7, 90), ("data", 7, 90), ("backward", 7, 91))
    assert (blamed := detector.hung(100.0)) is not None and (blamed.rank, blamed.phase) == (1, "data")
    all_say(detector, 101.0, ("backward", 7, 90), ("update", 6, 90), ("forward", 7, 91), beat=2)
    assert (blamed := detector.hung(101.0)) is not None and (blamed.rank, blamed.node, blamed.step) == (1, "n1", 6)


def test_a_process_that_stands_still_is_blamed_before_those_that_wait(detector: HangDetector) -> None:
    all_say(detector, 100.0, ("forward", 7, 0), ("update", 7, 0), ("forward", 7, 0))
    for beat in range(2, 16):
        for rank in (0, 2):
            say(detector.folder, rank, "forward", 7, 5.0 * beat, beat)
        detector.listen(100.0 + 5 * beat)
    blamed = detector.hung(170.0)
    assert blamed is not None and blamed.rank == 1
    assert blamed.silence(170.0) == pytest.approx(70.0)


def test_a_rank_that_has_left_is_not_blamed_while_another_concludes(detector: HangDetector) -> None:
    all_say(detector, 100.0, ("end", 9, 0), ("left", 9, 0), ("left", 9, 0))
    for beat in range(2, 40):
        say(detector.folder, 0, "end", 9, 300.0 * beat, beat)
        detector.listen(100.0 + 300 * beat)
        blamed = detector.hung(100.0 + 300 * beat)
        assert blamed is None or (blamed.rank == 0 and 300 * beat > 60 * JOB.validate_minutes)
    assert blamed is not None


def test_a_rank_that_never_spoke_is_blamed_after_the_time_for_starting(detector: HangDetector) -> None:
    for beat in (1, 2):
        for rank in (0, 2):
            say(detector.folder, rank, "start", 0, 300.0 * beat, beat)
        detector.listen(300.0 * beat)
    assert detector.hung(599.0) is None
    blamed = detector.hung(601.0)
    assert blamed is not None and blamed.phase == "start"


def test_a_file_that_is_being_written_is_read_the_next_time(detector: HangDetector) -> None:
    all_say(detector, 10.0, ("forward", 1, 0), ("forward", 1, 0), ("forward", 1, 0))
    (detector.folder / "rank-00001").write_text('{"rank": 1, "no')
    detector.listen(11.0)
    assert detector.heard[1].beat == 1


def test_a_pulse_says_what_the_main_thread_does_while_that_is_busy(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path, rank=2, seconds=0.02)
    detector = HangDetector(tmp_path, 3, JOB, now=time.monotonic())
    writer.enter("backward", 41)
    deadline = time.monotonic() + 20
    while detector.heard[2].phase != "backward" or detector.heard[2].silent < 0.1:
        detector.listen(time.monotonic())
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert (detector.heard[2].step, detector.heard[2].rank) == (41, 2)
    writer.end()
    detector.listen(time.monotonic())
    assert detector.heard[2].phase == "left"
    deadline = time.monotonic() + 20
    while any(thread.name == "heartbeat" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
