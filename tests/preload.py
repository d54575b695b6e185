"""What launcher.py's fork server does once, after its imports, for all the runs it will start."""

import gc

import tyro

import train
from gptxs.tokenizer import get_tokenizer

get_tokenizer()
tyro.cli(train.TrainConfig, args=[])  # imports the rest of tyro
train.plot.plot_run = lambda *_: None  # it takes longer than training here, and has its own tests
gc.collect()
gc.freeze()  # a child need not look at what was imported
