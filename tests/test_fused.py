"""What Liger-Kernel computes in one kernel is what the model computed in several, under Triton's interpreter."""

from kernel_checks import run_interpreted


def test_rotations() -> None:
    run_interpreted("fused_interpreted.py")
