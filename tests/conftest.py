"""One thread a test process: two of them share the cores already, and so do the runs they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
