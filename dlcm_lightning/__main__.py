"""`python -m dlcm_lightning` is the `dlcm` command."""

from __future__ import annotations

from dlcm_lightning.cli import entry

entry()
