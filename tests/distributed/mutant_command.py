"""The `dlcm` command with a bug in it: `MUTANT=name python -m tests.distributed.mutant_command pretrain ...`"""

from __future__ import annotations

import os
import sys

from dlcm_lightning.cli import main
from tests.distributed.mutants import plant

if __name__ == "__main__":
    plant(os.environ["MUTANT"])
    sys.exit(main())
