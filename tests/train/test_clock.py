import time

import pytest
import torch

from train.clock import Clock


def test_parts_add_up_to_the_whole():
    clock = Clock(torch.device("cpu"))
    time.sleep(0.02)
    clock.start()
    began = time.perf_counter()
    for part, seconds in (("forward", 0.01), ("backward", 0.03), ("forward", 0.02)):
        time.sleep(seconds)
        clock.mark(part)
    whole = time.perf_counter() - began
    found = clock.seconds()
    assert list(found) == ["forward", "backward"]
    assert found["forward"] >= 0.03 and found["backward"] >= 0.03
    assert sum(found.values()) == pytest.approx(whole, abs=2e-3)
