"""Tests run side by side: one thread each is faster than many that wait for one another."""

import os

# Before anything imports numba, which refuses to change its mind once its threads run.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
