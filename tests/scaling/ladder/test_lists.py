"""What `dlcm ladder run --write` hands to an array of SLURM, and files that several processes write at once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.scaling.ladder.plan import grid
from dlcm_lightning.scaling.ladder.study_run import NOTHING, Part, chosen, overview, run_study, write_for_slurm
from dlcm_lightning.scaling.ladder.table_file import write_csv
from dlcm_lightning.scaling.ladder.transfer import overview as transfer_overview
from tests.scaling.ladder.conftest import MakeStudy


def list_that_was_written(said: list[str]) -> tuple[str, list[str]]:
    """Of runs: the array's indices, and the runs by line."""
    _, array, script, file = said[1].split()
    assert script == "slurm/ladder.sh" and array.startswith("--array=")
    return array.removeprefix("--array="), Path(file).read_text().splitlines()


def written(make_study: MakeStudy, folder: Path, pattern: str | None, **axes: list[int]) -> list[str]:
    study = make_study(folder, **axes)
    said: list[str] = []
    write_for_slurm(study, chosen(grid(study), pattern, None), said.append)
    return said


def test_task_i_is_line_i_of_the_runs_that_were_chosen_whatever_else_is_in_the_folder(make_study: MakeStudy,
                                                                                      tmp_path: Path) -> None:
    everything = written(make_study, tmp_path, None, ratios=[2, 4, 8])
    indices, lines = list_that_was_written(everything)
    assert indices == "0-2" and [load_config(line).name for line in lines] == ["t-R2-s0", "t-R4-s0", "t-R8-s0"]
    chosen_ones = written(make_study, tmp_path, "*-R4-*", ratios=[2, 4, 8])
    indices, lines = list_that_was_written(chosen_ones)
    assert indices == "0-0" and [load_config(line).name for line in lines] == ["t-R4-s0"]
    fewer = written(make_study, tmp_path, None, ratios=[8])
    assert list_that_was_written(fewer)[1] == [str(tmp_path / "t/runs/t-R8-s0.yaml")]


def test_a_list_is_never_changed_and_the_same_choice_has_the_same_list(make_study: MakeStudy, tmp_path: Path) -> None:
    first = written(make_study, tmp_path, None, ratios=[4, 8])
    file = Path(first[1].split()[-1])
    before = file.read_bytes(), file.stat().st_mtime_ns
    more = written(make_study, tmp_path, None, ratios=[2, 4, 8])
    assert more[1] != first[1] and written(make_study, tmp_path, None, ratios=[4, 8]) == first
    assert before == (file.read_bytes(), file.stat().st_mtime_ns)
    assert len(list((tmp_path / "t/lists").iterdir())) == 2


def test_a_part_without_runs_says_so(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tmp_path, ratios=[2, 4])
    mine = chosen(grid(study), None, Part(3, 4))
    assert mine == [] and list(overview(study, mine)) == [NOTHING]
    said: list[str] = []
    write_for_slurm(study, mine, said.append)
    assert said == [NOTHING] and not (tmp_path / "t").exists()
    assert run_study(study, grid(study), mine, write_csv, said.append) and said[1] == "nothing to do"


def test_a_part_of_a_transfer_without_runs_says_so(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tmp_path, transfer={"factors": [0.5, 1, 2], "sweeps": [
        {"name": "D", "widths": [{"name": "w"}]}]})
    assert list(transfer_overview(study, Part(3, 4))) == [NOTHING]


def test_two_processes_that_save_one_configuration_at_once_both_do(make_study: MakeStudy, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one comes in between writing and renaming."""
    config = grid(make_study(tmp_path))[0].config
    file = tmp_path / "config.yaml"
    rename, own = os.replace, os.getpid()

    def other_first(source: str, target: str) -> None:
        monkeypatch.setattr(os, "replace", rename)
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        save_config(replace(config, seed=8), file)
        rename(source, target)

    monkeypatch.setattr(os, "replace", other_first)
    save_config(config, file)
    assert load_config(file) == config and [one.name for one in tmp_path.iterdir()] == ["config.yaml"]


def test_a_configuration_that_cannot_be_saved_leaves_nothing_behind(make_study: MakeStudy, tmp_path: Path) -> None:
    config = grid(make_study(tmp_path))[0].config
    (tmp_path / "taken" / "within").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        save_config(config, tmp_path / "taken")
    assert [one.name for one in tmp_path.iterdir()] == ["taken"]
