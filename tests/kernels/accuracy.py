"""How a kernel is judged: against fp64, beside what plain torch loses in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.kernels.attention import reference
from signlattice_paper.experiments.fidelity import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests run: a GPU, or Triton's interpreter on a CPU."""


def assert_accurate(got: Tensor, plain: Tensor, exact: Tensor, atol: float) -> None:
    """Fail unless ``got`` is at most twice as far from ``exact`` as ``plain`` is, plus ``atol``.

    ``plain`` is what torch makes of the same inputs with every step in the kernel's dtype.
    """
    error, allowed = relative_error(got, exact), 2 * relative_error(plain, exact) + atol
    assert allowed < float("inf"), "plain torch gives NaN: nothing to compare with"
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"


def plain_attention(query: Tensor, *arguments: object, **options: object) -> Tensor:
    """`reference.decode_attention` as a model in the query's dtype would do it: no step wider."""
    return reference.attention_in(query.dtype, query, *arguments, **options)
