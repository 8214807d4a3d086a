"""The Triton kernels equal their torch forms, under Triton's interpreter."""

from kernel_checks import run_interpreted


def test_triton_kernels_equal_their_torch_forms_under_the_interpreter() -> None:
    run_interpreted("kernels_interpreted.py")
