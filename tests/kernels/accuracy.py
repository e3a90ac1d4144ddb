"""How a kernel is judged: against fp64, by a tolerance derived from what it computes.

A tolerance depends on the dtype of inputs and outputs, on the length of the sums, which are in
fp32, and on the size of what is summed. It does not depend on what another implementation gives,
which changes with the processor and with the alignment of memory. Rounding errors are taken as
independent (Higham and Mary 2019), so that a sum of n terms loses √n roundings, and `SAFETY` times
that is allowed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from signlattice.kernels.layout import FullPrecisionTokens, PackedKeys, PackedValues
from signlattice.kernels.unpack.reference import dequantise
from signlattice_paper.experiments.fidelity import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests run: a GPU, or Triton's interpreter on a CPU."""

SAFETY = 2.0


def rounding(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def assert_accurate(got: Tensor, exact: Tensor, tolerance: float) -> None:
    """Fail unless the relative error of ``got`` is within ``tolerance``."""
    error = relative_error(got, exact)
    assert error <= tolerance, f"relative error {error:.3g}, allowed {tolerance:.3g}"


def product_tolerance(dtype: torch.dtype, *lengths: int) -> float:
    """Allow for products with sums of such lengths in fp32, inputs and outputs in ``dtype``."""
    sums = sum(math.sqrt(n) for n in lengths) * rounding(torch.float32)
    return SAFETY * (2 * rounding(dtype) + sums)


def attention_tolerance(
    query: Tensor,
    keys: PackedKeys,
    rotation: Tensor,
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    scaling: float,
    softcap: float | None = None,
    full: FullPrecisionTokens | None = None,
) -> float:
    """Allow for decode attention: arguments are those of `reference.decode_attention`.

    A score's error moves the output by as much, relatively. The sizes of a score's D terms add up
    to ‖q‖ ‖k‖; each term is rounded to the query's dtype by itself, so that √D of them lose as much
    as one, and the sums for a rotated query and for the score are in fp32. A weight and the output
    are rounded to the dtype, and sums over tokens are in fp32.
    """
    d = query.shape[-1]
    t = torch.arange(keys.words.shape[2], device=query.device)
    there = ((t >= start[:, None]) & (t < length[:, None]))[:, None]
    norms = dequantise(keys, rotation.double(), None, torch.float64).norm(dim=-1)
    longest = norms.masked_fill(~there, 0.0).nan_to_num(0.0).amax().item() if len(t) else 0.0
    n_tokens = len(t)
    if full is not None:
        n_tokens += full.keys.shape[2]
        here = torch.arange(full.keys.shape[2], device=query.device) < full.length[:, None]
        sizes = full.keys.double().norm(dim=-1).masked_fill(~here[:, None], 0.0)
        longest = max(longest, sizes.amax().item() if sizes.numel() else 0.0)
    size = scaling * query.double().norm(dim=-1).amax().item() * longest
    wide, own = rounding(torch.float32), rounding(query.dtype)
    score = size * (own / math.sqrt(d) + 2 * wide)
    return SAFETY * (score + 2 * own + math.sqrt(max(1, n_tokens)) * wide)
