"""How a kernel is judged: against fp64, beside what plain torch loses in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.kernels.attention import reference
from signlattice.kernels.layout import PackedKeys, PackedValues, WholeTokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests run: a GPU, or Triton's interpreter on a CPU."""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖ in fp64, NaN counted as infinite."""
    difference = (got.double() - exact.double()).norm() / exact.double().norm()
    return difference.nan_to_num(torch.inf).item()


def assert_accurate(got: Tensor, plain: Tensor, exact: Tensor, atol: float) -> None:
    """Fail unless ``got`` is at most twice as far from ``exact`` as ``plain`` is, plus ``atol``.

    ``plain`` is what torch makes of the same inputs with every step in the kernel's dtype.
    """
    error, allowed = relative_error(got, exact), 2 * relative_error(plain, exact) + atol
    assert allowed < float("inf"), "plain torch gives NaN: nothing to compare with"
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"


def plain_attention(
    query: Tensor,
    keys: PackedKeys,
    rotation: Tensor,
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    scaling: float,
    softcap: float | None = None,
    whole: WholeTokens | None = None,
) -> Tensor:
    """`reference.decode_attention` as a model in the query's dtype would do it: no step wider."""
    dtype, n_heads = query.dtype, rotation.shape[0]
    q = query.unflatten(1, (n_heads, -1))
    k = reference.dequantise(keys, rotation).to(dtype)
    v = (values.read() if isinstance(values, PackedValues) else values).to(dtype)
    t = torch.arange(k.shape[2], device=k.device)
    there = (t >= start[:, None]) & (t < length[:, None])
    if whole is not None:
        e = torch.arange(whole.keys.shape[2], device=k.device)
        there = torch.cat((there, e < whole.length[:, None]), -1)
        k, v = torch.cat((k, whole.keys.to(dtype)), 2), torch.cat((v, whole.values.to(dtype)), 2)
    scores = (q @ k.mT) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    there = there[:, None, None]
    weights = scores.masked_fill(~there, -torch.inf).softmax(-1).masked_fill(~there, 0.0)
    v = v.masked_fill(~there.squeeze(2)[..., None], 0.0)
    return (weights @ v).flatten(1, 2)
