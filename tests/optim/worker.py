"""One process of several: what worker scripts do before and after their work."""

import os
import sys
import traceback

import torch
import torch.distributed as dist


def run(work, rank, processes, meeting):
    """Do ``work()`` beside the other processes, which meet at a file, and leave with 0, or 1 where it raised."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    code = 0
    try:
        work()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:
        dist.barrier()
        dist.destroy_process_group()
    # threads of a backend may be in the way of an ordinary exit
    os._exit(code)
