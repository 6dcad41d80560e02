"""What pyproject.toml cannot say: folders of the project that a wheel carries inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = {"configs": "*.yaml", "data/sources": "*.yaml", "slurm": "*.sh"}


class BuildWithShippedFiles(build_py):
    """An editable installation finds them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        here, target = Path(__file__).parent, Path(self.build_lib) / "dlcm_lightning" / "shipped_files"
        shutil.rmtree(target, ignore_errors=True)
        for folder, pattern in FOLDERS.items():
            for file in sorted((here / folder).rglob(pattern)):
                to = target / file.relative_to(here)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)


setup(cmdclass={"build_py": BuildWithShippedFiles})
