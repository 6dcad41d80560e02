"""Tests run side by side (`make test`), each on one thread, on the CPU also where there is a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("DLCM_DEVICE", "cpu")
