"""Which machine code each Triton kernel is launched as, found by launching.

Every launch function is called as the server calls it, with tensors that have shapes and strides but no memory (torch's
device "meta"), for a GPU that need not be there. What Triton would have compiled for the call is taken down, and
nothing runs. So a change of a kernel's arguments, tile or options is followed without a list to keep.
"""

import importlib
import itertools
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from launch_cases import Case, Variant
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from gossamer.kernels import triton as forms

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200


@dataclass(frozen=True)
class Launch:
    """One kernel as one call has it compiled for one GPU."""

    kernel: str  # `paged_prefill._paged_prefill`
    variant: Variant
    capability: int
    specialization: str = field(repr=False)  # types, constants, alignments, options: JSON, as Triton writes it

    @property
    def name(self) -> str:
        """`paged_prefill._paged_prefill bf16 d128 softcap sm_90`"""
        return f"{self.kernel} {self.variant} sm_{self.capability}"

    @property
    def function(self) -> JITFunction[Any]:
        module, _, name = self.kernel.partition(".")
        found = getattr(importlib.import_module(f"{forms.__name__}.{module}"), name)
        assert isinstance(found, JITFunction)
        return found

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel was given for its constexpr arguments."""
        held, names = json.loads(self.specialization), self.function.arg_names
        return {names[path[0]]: value for path, value in zip(held["constant_keys"], held["constant_vals"], strict=True)}

    def compile(self) -> CompiledKernel:
        with _pretended_gpu(self.capability, -self.capability):
            return self.function.preload(self.specialization)


def record(cases: Iterable[Case], targets: Iterable[int] = TARGETS) -> list[Launch]:
    """What the cases launch, each piece of machine code once: under the first case that needs it."""
    found: dict[tuple[int, str], Launch] = {}
    for capability, case in itertools.product(targets, cases):
        for kernel, specialization in _launched(case.call, capability):
            module = kernel.__module__.rpartition(".")[2]
            launch = Launch(f"{module}.{kernel.__name__}", case.variant, capability, specialization)
            found.setdefault((capability, specialization), launch)
    assert len({launch.name for launch in found.values()}) == len(found), "two launches have one name"
    return list(found.values())


def _launched(call: Callable[[], object], capability: int) -> list[tuple[JITFunction[Any], str]]:
    """The kernels that `call` launches, with what Triton calls their specialisation data."""
    found: list[tuple[JITFunction[Any], str]] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        found.append((fn.jit_function, compile["specialization_data"]))
        return True  # do not compile, and so do not run

    # Of Triton this needs what it offers for compiling kernels ahead of their use, alike from 3.6 to 3.9: the hook
    # before compilation with its specialisation data, JITFunction.preload, which compiles that, and driver.set_active.
    with ExitStack() as stack:
        stack.enter_context(_pretended_gpu(capability, capability))
        stack.enter_context(_patched_capability(capability))
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.jit_cache_hook = note
        call()
    return found


class _PretendedDriver:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int, number: int) -> None:
        self.capability, self.number = capability, number

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _pretended_gpu(capability: int, number: int) -> Iterator[None]:
    """Within, Triton believes in one such GPU. It keeps what it compiled by the device's number, and would run that."""
    driver.set_active(_PretendedDriver(capability, number))
    try:
        yield
    finally:
        driver.set_active(None)  # it looks for the real one when it is next asked


@contextmanager
def _patched_capability(capability: int) -> Iterator[None]:
    """Within, every device has this capability, for the launching modules, which import the function by name."""
    with ExitStack() as stack:
        for module in _modules():
            if hasattr(module, "capability"):
                stack.enter_context(patch.object(module, "capability", lambda device: capability))
        yield


def _modules() -> list[ModuleType]:
    """Those of kernels/triton/."""
    return [importlib.import_module(f"{forms.__name__}.{found.name}") for found in pkgutil.iter_modules(forms.__path__)]


def kernels() -> set[str]:
    """Every kernel that some function of kernels/triton/ launches, as Launch.kernel names it."""
    found = set()
    for module in _modules():
        host = [value for value in vars(module).values() if isinstance(value, FunctionType)]
        used = {name for function in host for name in function.__code__.co_names}
        own = {name for name in used if isinstance(getattr(module, name, None), JITFunction)}
        found |= {f"{module.__name__.rpartition('.')[2]}.{name}" for name in own}
    return found
