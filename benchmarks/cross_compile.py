"""Compile every kernel for GPUs that are not here, and print what each takes of one, as JSON.

``python cross_compile.py 90`` compiles the cases in `kernel_cases.DEFAULT` for sm_90; ``--all``
after it all cases, and a word after it those whose name contains it. The exit status is 1 if any
case fails, spills registers, or needs more shared memory than there is.

The wrappers are called as a user would call them, on CPU tensors; in place of a launch the kernel
is compiled for the architecture, specialised as Triton would specialise it on these arguments.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is first imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernel_cases
from signlattice.kernels import runtime

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program can have, by architecture."""
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def compiled(launch: runtime.Launch, arguments: tuple, arch: int) -> dict[str, int]:
    """Registers, stack and shared memory of one launch, in the units of cuobjdump (bytes)."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    values = dict(zip(launch.kernel.arg_names, arguments))
    for place, name in enumerate(launch.kernel.arg_names):
        value = values.get(name)
        if name in constants or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    places = {(launch.kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(launch.kernel, signature, places, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spilled": stack + local, "shared": binary.metadata.shared}


def report(name: str, arch: int) -> dict:
    """What the launches of a case take, or the error that compiling them ended with."""
    launches = []
    runtime.Launch.__call__ = lambda launch, grid, *arguments: launches.append(
        {"kernel": launch.kernel.__name__} | compiled(launch, arguments, arch)
    )
    try:
        kernel_cases.CASES[name]()
    except Exception as error:  # a kernel that does not compile is a finding, not a crash
        return {"case": name, "error": f"{type(error).__name__}: {error}"[:2000]}
    return {"case": name, "launches": launches}


def fits(line: dict, arch: int) -> bool:
    """Whether a case compiled, without spills, in the shared memory that there is."""
    return bool(line.get("launches")) and all(
        launch["spilled"] == 0 and launch["shared"] <= SHARED[arch] for launch in line["launches"]
    )


def main(arch: int, wanted: str | None = None) -> int:
    """Print one line of JSON for every case that is asked for; return the exit status."""
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    runtime._check_device = lambda devices: None
    names = kernel_cases.DEFAULT
    if wanted is not None:
        names = [name for name in kernel_cases.CASES if wanted == "--all" or wanted in name]
    failed = not names
    for name in names:
        line = report(name, arch)
        failed |= not fits(line, arch)
        print(json.dumps({"arch": arch} | line | {"fits": fits(line, arch)}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
