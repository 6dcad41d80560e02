"""The `dlcm` command with a bug in it: `MUTANT=name python -m tests.distributed.mutant_command pretrain ...`"""

from __future__ import annotations

import os

from dlcm_lightning.cli import entry
from tests.distributed.mutants import plant

if __name__ == "__main__":
    plant(os.environ["MUTANT"])
    entry()
