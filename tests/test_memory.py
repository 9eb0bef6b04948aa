"""Freed memory is kept for the next tensors where the C library can be asked to."""

import platform
import subprocess
import sys

import pytest

# What a forward pass does: a large tensor for each block, freed before the next.
BLOCKS = """
import resource, torch
from persona_nns.models.memory import keep_freed_memory

def faults():
    torch.zeros(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for block in range(10):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The least of some tries: the kernel may take pages back meanwhile.
print(faults(), keep_freed_memory(), min(faults() for _ in range(8)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_a_block_takes_the_memory_that_the_last_one_left() -> None:
    said = subprocess.run(
        [sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True
    )
    freed, asked, kept = said.stdout.split()
    assert asked == "True"
    assert int(freed) > 3 * int(kept)
