"""What every test process has in common: one thread, and signals that work."""

import os
import signal

# Two test processes share the cores already, and so do the runs that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
