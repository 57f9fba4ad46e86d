"""Fine-tune a causal language model on chats: configuration, data, model, loop, validation, saving.

    torchrun --nproc_per_node 8 train_sft.py configs/squad.yaml train.learning_rate=1e-5
    python train_sft.py                     # one process; configs/squad.yaml where no file is named
"""

import contextlib
import datetime
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import config as configuration
import data
import model as modelling
import packing
import templates
from tracking import Tracker

USAGE = "usage: train_sft.py [CONFIG.yaml | --config CONFIG.yaml] [KEY=VALUE ...]"


def main():
    cfg = read_command_line(sys.argv[1:])
    rank, local_rank, world_size = launch(cfg)
    output_dir = Path(cfg.output_dir)
    try:
        tokenizer, train_set, validation_set, stop_ids = prepare(cfg, local_rank)
        if world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        start, finished = begin(cfg, output_dir, rank)
        if finished:
            if rank == 0:
                print(f"{output_dir} holds a finished run; its model is in {output_dir / 'model'}. To train again, "
                      "name another output_dir; to train on, raise train.max_steps.")  # fmt: skip
            return
        train(cfg, output_dir, rank, local_rank, world_size, tokenizer, train_set, validation_set, stop_ids, start)
    except (ValueError, OSError, FloatingPointError) as error:
        if output_dir.is_dir() and not isinstance(error, configuration_error(cfg)):
            set_status(output_dir, "failed", 0, str(error))
        raise SystemExit(f"error: {explain(error, cfg)}") from (None if not os.environ.get("SFT_TRACEBACK") else error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
