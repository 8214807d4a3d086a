"""What the tests of single kernels share: Triton's interpreter in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(file: str) -> None:
    """Run a file of tests under Triton's interpreter: TRITON_INTERPRET has to be set before Triton is imported."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here / file)],
        cwd=here.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert " passed" in found.stdout, found.stdout[-4000:]
