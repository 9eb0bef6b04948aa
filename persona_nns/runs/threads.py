"""How many threads torch computes with: the cores that others leave free.

Two threads of one operation wait for each other. Where other processes want the cores too, a
thread that waits for its turn keeps all the others waiting, and more threads are slower than one.
"""

import os
import time

import psutil

_BEGAN = time.monotonic(), sum(psutil.cpu_times()[:3]), sum(os.times()[:2])
_SHORTEST = 0.5  # seconds over which it can be told how busy a machine is


def free_cores() -> int:
    """How many of this process's cores others have left idle since it began; at least one.

    Cores are what the process may use (affinity), and what others use is all processor time but
    its own.
    """
    passed = time.monotonic() - _BEGAN[0]
    if passed < _SHORTEST:
        time.sleep(_SHORTEST - passed)
        passed = time.monotonic() - _BEGAN[0]
    busy = sum(psutil.cpu_times()[:3]) - _BEGAN[1]
    own = sum(os.times()[:2]) - _BEGAN[2]
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    idle = (os.cpu_count() or 1) - max(0.0, busy - own) / passed
    return max(1, min(allowed, round(idle)))


def set_threads(n_threads: int | None, n_processes: int = 1) -> int:
    """Let torch compute with so many threads; returns how many.

    Args:
        n_threads: as asked for; None is what OMP_NUM_THREADS says, or the cores that are free.
        n_processes: that share them where they are not asked for.
    """
    import torch

    if n_threads is None and "OMP_NUM_THREADS" not in os.environ:
        n_threads = max(1, free_cores() // n_processes)
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    return torch.get_num_threads()
