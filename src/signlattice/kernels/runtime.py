"""What the Triton kernels share: how one is launched, and what the interpreter needs.

Triton's interpreter runs a kernel on a CPU, slowly, for its tests: set TRITON_INTERPRET=1 before
anything imports triton. It gets bfloat16 wrong, so kernels are shown such tensors as float32 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from signlattice.errors import InputError

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter: fixed when triton was first imported."""

SMALLEST_DOT = 16
"""Least size of any side of a ``tl.dot`` on tensor cores."""


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that is fixed at compile time.

    The same object is launched by a wrapper and cross-compiled by the tests, so that what is
    checked for spills and shared memory is what runs.
    """

    kernel: JITFunction
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def __call__(self, grid: tuple[int, ...], *arguments: object) -> None:
        """Run the kernel over ``grid``. Raises ``InputError`` where Triton cannot run."""
        _check_device({x.device.type for x in arguments if isinstance(x, Tensor)})
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[grid](*arguments, **self.constants, **options)


def interpreter_view(tensor: Tensor) -> Tensor:
    """Return the tensor as a kernel is shown it: bfloat16 as float32 in the interpreter."""
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def padded(n: int) -> int:
    """Return the least side of a ``tl.dot`` that holds ``n``: a power of two, 16 or more."""
    return max(SMALLEST_DOT, triton.next_power_of_2(n))


def n_programs(tiles: int, device: torch.device, per_core: int = 4) -> int:
    """Count how many persistent programs share so many tiles: a few per multiprocessor."""
    if INTERPRETED or device.type != "cuda":  # the launch will say what is wrong with the latter
        return min(tiles, 2)
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, per_core * cores)


def _check_device(devices: set[str]) -> None:
    if len(devices) > 1:
        raise InputError(f"tensors on {' and '.join(sorted(devices))}: move them to one device")
    if "cuda" not in devices and not INTERPRETED:
        raise InputError(
            f"impl='triton' on {devices.pop()} tensors: use a GPU, impl='torch', or set "
            "TRITON_INTERPRET=1 before Python starts"
        )
