"""Compile every kernel for GPUs that are not here, and print what each takes of one, as JSON.

Run without TRITON_INTERPRET: ``python cross_compile.py 90``. The wrappers are called as a user
would call them, on CPU tensors; in place of a launch the kernel is compiled for the architecture,
specialised as Triton would specialise it on these arguments.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import cases
from signlattice.kernels import runtime

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


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


def main(arch: int, wanted: str = "") -> None:
    """Print one line of JSON for every case whose name holds ``wanted``."""
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    for name, call in cases.CASES.items():
        if wanted not in name:
            continue
        launches = []
        runtime.Launch.__call__ = lambda launch, grid, *arguments: launches.append(
            {"kernel": launch.kernel.__name__} | compiled(launch, arguments, arch)
        )
        try:
            call()
            print(json.dumps({"case": name, "launches": launches}), flush=True)
        except Exception as error:  # a kernel that does not compile is a finding, not a crash
            print(json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"[:2000]}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
