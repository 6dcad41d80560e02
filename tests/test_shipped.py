"""What comes with the package goes by its name from any folder; a file of the user's comes first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dlcm_lightning import shipped
from dlcm_lightning.cli import main
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import ConfigError
from dlcm_lightning.data.preprocessing.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def test_a_run_file_goes_by_its_name_or_path_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_config(ROOT / "configs" / "run" / "smoke.yaml")
    for name in ("smoke", "smoke.yaml", "run/smoke", "configs/run/smoke.yaml"):
        if name != "run/smoke":
            assert load_config(name) == expected
    with pytest.raises(ConfigError, match=r"'smoek': there is no such file; did you mean smoke\?"):
        load_config("smoek")
    assert load_recipe("nemotron-cc") == load_recipe(ROOT / "data" / "sources" / "nemotron-cc.yaml")


def test_a_file_here_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()  # a folder is no run file
    assert load_config("smoke").name == "smoke"
    (tmp_path / "smoke").rmdir()
    (tmp_path / "smoke").write_text("base: [run/smoke]\nname: mine\n")
    assert load_config("smoke").name == "mine"


def test_bases_of_a_copied_run_file_are_found_and_its_own_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                     ) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "smoke", "mine.yaml"]) == 0
    assert load_config("mine.yaml") == load_config("smoke")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample.yaml").write_text("data: {root: elsewhere}\n")
    with pytest.raises(ConfigError, match=r"data\.sources"):
        load_config("mine.yaml")


def test_a_copy_replaces_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                 ) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "quickstart"]) == 0
    edited = (tmp_path / "quickstart.yaml").read_text() + "# mine\n"
    (tmp_path / "quickstart.yaml").write_text(edited)
    assert main(["configs", "quickstart"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "quickstart.yaml").read_text() == edited
    assert main(["configs", "quikstart"]) == 2
    assert "did you mean quickstart?" in capsys.readouterr().err


def test_configs_lists_every_run_file_with_a_word_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(file.stem for file in (ROOT / "configs" / "run").iterdir())
    assert all(len(line.split()) > 4 for line in lines)


def test_slurm_templates_start_this_python_and_are_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                                  ) -> None:
    assert main(["slurm", "init", str(tmp_path)]) == 0
    written = {file.name for file in (tmp_path / "slurm").iterdir()}
    assert written == {file.name for file in (ROOT / "slurm").iterdir()}
    found = subprocess.run(["bash", "-c", ". slurm/site.sh; echo $DLCM_PYTHON"], cwd=tmp_path, text=True, check=True,
                           capture_output=True, env={"PATH": "/usr/bin:/bin"})
    assert found.stdout.strip() == sys.executable
    assert main(["slurm", "init", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_wheel_holds_them_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "dlcm_lightning"
    (inside / shipped.IN_WHEEL / shipped.RUNS).mkdir(parents=True)
    (inside / shipped.IN_WHEEL / shipped.RUNS / "one.yaml").write_text("# A run.\n")
    monkeypatch.setattr(shipped, "__file__", str(inside / "shipped.py"))
    assert shipped.names(shipped.RUNS) == ["one"]
    assert shipped.find("one", shipped.RUNS) == inside / shipped.IN_WHEEL / shipped.RUNS / "one.yaml"
