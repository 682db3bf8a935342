"""Several processes that answer together, one a device: how they begin, wait for one another and share what the first one read.

They are torch.distributed's: those that train together go on as they are, and `torchrun` starts some for an evaluation alone. One
process is the same with nobody to wait for. A process that fails ends with its own error, and the others at their next meeting.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

WAIT = timedelta(days=7)
"""The others may have that much more to do. (The usual 10 or 30 minutes are meant for a training step.)"""


def join() -> None:
    """Take part in the processes that torchrun started, if it did, each with a GPU of its own where there are some."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=WAIT)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def ranks() -> tuple[int, int]:
    """This process' number, and how many there are."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def meet() -> None:
    """Wait until all are here.

    Raises:
        RuntimeError: one has ended; the message names it.
    """
    if ranks()[1] > 1:
        dist.monitored_barrier(_group(dist.group.WORLD), timeout=WAIT)


def from_first(make: Callable[[], Any]) -> Any:
    """What `make()` returns in the first process, for all of them; the others do not call it."""
    rank, count = ranks()
    if count == 1:
        return make()
    made = [make() if rank == 0 else None]
    dist.broadcast_object_list(made, group=_group(dist.group.WORLD))
    return made[0]


@lru_cache(maxsize=1)
def _group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All processes once more, over the processor: it waits for long, and it notices at once when one has ended."""
    return dist.new_group(backend="gloo", timeout=WAIT)
