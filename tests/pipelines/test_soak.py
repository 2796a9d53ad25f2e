"""A short soak: see soak.py."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_random_kills_lose_nothing(recipe):
    words = [sys.executable, str(Path(__file__).parent / "soak.py"), "--kills", "3", str(recipe)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RESULT soak kills=3" in done.stdout and "lost=0" in done.stdout
