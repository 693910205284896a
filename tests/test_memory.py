"""The guard pages of memory.py bite."""

import ctypes

import torch
from memory import Guarded, in_child


def test_the_guard_bites():
    ends, starts = (Guarded(torch.zeros(1), at_end) for at_end in (True, False))
    assert in_child(lambda: ctypes.string_at(ends.address, 4)) == 0
    assert in_child(lambda: ctypes.string_at(ends.address, 5)) != 0
    assert in_child(lambda: ctypes.string_at(starts.address - 1, 1)) != 0
