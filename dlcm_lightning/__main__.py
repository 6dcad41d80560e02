"""`python -m dlcm_lightning` is the `dlcm` command."""

import sys

from dlcm_lightning.cli import main

sys.exit(main())
