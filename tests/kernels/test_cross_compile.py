"""Every kernel compiles for the GPUs it is made for, without spills, in the memory there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import kernel_cases

ARCHITECTURES = (pytest.param(80, marks=pytest.mark.exhaustive), 90)
SCRIPT = Path(kernel_cases.__file__).with_name("cross_compile.py")


@cache
def compiled(arch: int) -> dict[str, dict]:
    """What the default cases take of an architecture, by case."""
    outside = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(arch)],
        env=outside | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", kernel_cases.DEFAULT)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cross_compile_has_no_spills_and_fits_shared_memory(arch, name):
    line = compiled(arch)[name]
    assert line.get("launches"), line.get("error", "nothing was launched")
    assert line["fits"], line["launches"]


@pytest.mark.parametrize("kernel", sorted({name.partition(",")[0] for name in kernel_cases.CASES}))
def test_kernel_cases_by_default_have_every_kernel(kernel):
    assert any(name.startswith(f"{kernel}, ") for name in kernel_cases.DEFAULT)


def test_cross_compile_reports_a_kernel_that_does_not_compile_and_fails(tmp_path):
    broken = tmp_path / "kernel_cases.py"
    broken.write_text(
        "import torch\n"
        "from signlattice import kernels\n"
        "def wrong(): kernels.hadamard_transform(torch.zeros(2, 17), impl='triton')\n"
        "def right(): kernels.hadamard_transform(torch.zeros(2, 16), impl='triton')\n"
        "CASES = {'wrong': wrong, 'right': right}\n"
        "DEFAULT = ('wrong', 'right')\n",
        encoding="utf-8",
    )
    # the script's own folder comes first on its path, so it is copied beside the other cases
    script = tmp_path / SCRIPT.name
    script.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    run = subprocess.run([sys.executable, script, "90"], capture_output=True, text=True)
    wrong, right = map(json.loads, run.stdout.splitlines())
    assert run.returncode == 1
    assert "InputError" in wrong["error"] and not wrong["fits"]
    assert right["fits"]
