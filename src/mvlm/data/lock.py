"""Locks of files, which the system itself drops when their holder ends, however it ends: nothing stale can remain."""

from __future__ import annotations

import fcntl
import logging
from typing import IO

log = logging.getLogger(__name__)


def taken(file: IO, wait: bool = False, shared: bool = False) -> bool:
    """Take the lock of an open file until it is closed; False: another process has it.

    A file system without locks, as Lustre's may be, keeps nobody out; that is told.

    Args:
        file: open to be written, or for a shared lock to be read, as NFS wants it.
        wait: until it is free.
        shared: held by several at a time; a look whether another has it to itself.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if not shared:
            log.warning("%s can't be locked (%s): nothing keeps two processes apart there", file.name, error)
    return True
