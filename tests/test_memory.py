"""Freed memory is kept for the next tensors where the C library can be asked to."""

import platform
import subprocess
import sys

import pytest

# What a forward pass does: a large tensor for each block, freed before the next.
BLOCKS = """
import resource, torch
from persona_nns.models.memory import keep_freed_memory
print(keep_freed_memory() if {kept} else None)
torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for block in range(10):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_a_block_takes_the_memory_that_the_last_one_left() -> None:
    def faults(*, kept: bool) -> tuple[str, int]:
        code = BLOCKS.format(kept=kept)
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        asked, count = said.stdout.split()
        return asked, int(count)

    asked, kept = faults(kept=True)
    assert asked == "True"
    assert faults(kept=False)[1] > 3 * kept
