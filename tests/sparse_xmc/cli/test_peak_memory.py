import numpy as np

from sparse_xmc.cli.memory import PeakMemory


def test_peak_memory_counts_from_construction():
    before = np.ones(400 << 20, np.uint8)  # an earlier, higher peak
    del before
    memory = PeakMemory()
    assert memory.bytes() < 50 << 20
    array = np.ones(200 << 20, np.uint8)
    del array
    assert 195 << 20 < memory.bytes() < 260 << 20
