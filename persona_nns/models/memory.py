"""How many cells fit into memory at a time, and what to do when they did not."""

import ctypes
import os
import sys
from collections.abc import Iterable, Sized

import psutil
import torch
from nnsight import TransformersModel

from persona_nns.errors import says_out_of_memory

# A batch may take this much on a CPU, where larger batches are hardly faster, and this share of
# what is free anywhere.
_ENOUGH_ON_CPU = 2**30
_SHARE_OF_FREE = 0.4
# More cells at a time are hardly faster, and what is measured is written a batch at a time.
_MOST_CELLS = 32
# Tokens that follow a prompt, and copies of a cell's cache and distributions that live at once.
_CONTINUATION = 16
_COPIES = 6
# Parameters of glibc's mallopt (malloc.h), and how much freed memory a process keeps.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 2**30


def keep_freed_memory() -> bool:
    """Keep up to 1 GiB of freed memory for the next tensors; says whether that could be asked for.

    glibc otherwise gives a tensor of over 32 MiB back to the system at once, and every block of
    the model has the same memory cleared for it again: a sixth of the time of the long grid.
    Other allocators are left as they are. The kernel is asked for large pages, which are cleared
    512 small ones at a time.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's; read at its first large tensor
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(which, _KEPT) == 1 for which in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)
    )


def fitting_batch_size(model: TransformersModel, prompts: Iterable[Sized]) -> int:
    """How many cells to measure at a time.

    An estimate from the size of a cell's key-value cache and next-token distributions, not more
    than 32; a batch that turns out too large is retried at half its size.

    Args:
        model: the loaded model.
        prompts: token ids of the prompts to come; the longest counts. None are known of a plan
            that renders nothing.
    """
    config = model.config.get_text_config()
    longest = max(map(len, prompts), default=0)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * kv_heads * d_head * model.dtype.itemsize
    cache = (longest + _CONTINUATION) * per_token
    distributions = _CONTINUATION * config.vocab_size * torch.float32.itemsize
    # A spread model has a part of every cache on each of its devices, and all of one on none.
    room = min(map(_memory_to_use, model.devices))
    fitting = int(room / (_COPIES * (cache + distributions)))
    return min(max(1, fitting), _MOST_CELLS)


def _memory_to_use(device: torch.device) -> float:
    if device.type == "cuda":
        # What torch has taken and does not use is free too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return _SHARE_OF_FREE * (torch.cuda.mem_get_info(device)[0] + kept)
    return min(_ENOUGH_ON_CPU, _SHARE_OF_FREE * psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a batch did not fit."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))
