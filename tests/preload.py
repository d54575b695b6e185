"""What launcher.py's fork server does once, after its imports, for all the runs it will start."""

import gc
import resource

import tyro

import train
from gptxs.tokenizer import get_tokenizer

get_tokenizer()
# The rest of tyro, which a child without root's rights may not be able to read.
tyro.cli(train.TrainConfig, args=[])
# Drawing takes longer than training here, and is tested elsewhere.
train.plot.plot_run = lambda *_: None
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # full disks kill with a signal that dumps core
gc.collect()
gc.freeze()  # a child need not look at what was imported
