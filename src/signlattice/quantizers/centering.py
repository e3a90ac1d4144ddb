"""Centerings: what is subtracted from keys before the rotation, and added back after.

Three methods, of which two are easily taken for each other:

- ``none``: keys stay as they are.
- ``dc``: each key loses its own component along the all-ones direction, the mean of its
  coordinates (paper S5). That number differs from token to token, so it must be stored with every
  key and added back.
- ``token_mean``: a head's keys lose one fixed vector, their mean over calibration tokens. A query
  meets it with the same score at every position, so softmax is blind to whether it is added back:
  it costs nothing per token. The exceptions are scores that pass through a soft cap, or share
  their softmax with a sink logit that is no key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from signlattice.errors import InputError, check_types

__all__ = ["CENTERING_METHODS", "Centering", "CenteringMethod"]

CenteringMethod = Literal["none", "dc", "token_mean"]
CENTERING_METHODS: tuple[CenteringMethod, ...] = get_args(CenteringMethod)


@dataclass(frozen=True, eq=False)
class Centering:
    """A centering with all that it needs to be undone.

    Attributes:
        method: "none", "dc" or "token_mean".
        mean: [..., d] for "token_mean", one vector per head; None for the others.

    Raises:
        InputError: for an unknown method, a mean where there should be none, or none where there
            should be one.

    Example:
        >>> import torch
        >>> from signlattice import Centering
        >>> keys = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> centering = Centering.fit(keys, "token_mean")
        >>> centred, offset = centering.split(keys)
        >>> centred
        tensor([[-1., -2.],
                [ 1.,  2.]])
        >>> torch.equal(centering.join(centred, offset), keys)
        True
    """

    method: CenteringMethod
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if (self.mean is not None) != (self.method == "token_mean"):
            given = "no mean" if self.mean is None else "a mean"
            raise InputError(
                f"centering {self.method!r} with {given}: a mean belongs to 'token_mean' alone"
            )
        if self.mean is not None and (self.mean.ndim == 0 or not self.mean.isfinite().all()):
            raise InputError("centering mean: expected a finite tensor of shape [..., d]")

    @property
    def n_bytes(self) -> int:
        """Bytes of the static mean at 32 bits a number, 0 without one."""
        return 0 if self.mean is None else 4 * self.mean.numel()

    @classmethod
    def fit(cls, keys: Tensor, method: CenteringMethod) -> Centering:
        """Fit a centering to calibration keys.

        Args:
            keys: [..., N, d]; the mean is taken over N, apart for each leading index, so that
                [H, N, d] gives every head a mean of its own. Fold a batch axis into N first.
            method: "none", "dc" or "token_mean".

        Raises:
            InputError: for an unknown method, or keys that are empty, not [..., N, d], or hold NaN
                or infinity.
        """
        _check_method(method)
        if keys.ndim < 2 or keys.numel() == 0:
            raise InputError(f"keys of shape {tuple(keys.shape)}: expected [..., N, d], not empty")
        if not keys.isfinite().all():
            raise InputError("keys hold NaN or infinite values: expected finite keys")
        if method != "token_mean":
            return cls(method)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        return cls(method, keys.detach().mean(dim=-2, dtype=torch.float64).to(dtype))

    def split(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Split keys into a centred part and the offset that was taken off.

        Args:
            keys: [..., T, d]; its leading axes must broadcast against those of ``mean``.

        Returns:
            (centred, offset): ``centred`` is [..., T, d]; ``offset`` broadcasts to it and is 0-d
            for "none", [..., T, 1] for "dc" (the mean of each key's coordinates), [..., 1, d] for
            "token_mean".

        Raises:
            InputError: if the keys do not fit the mean that was fitted.
        """
        if keys.ndim == 0 or keys.shape[-1] == 0:
            raise InputError(f"keys of shape {tuple(keys.shape)}: expected [..., T, d], d >= 1")
        offset = self._offset(keys)
        return keys - offset, offset

    def join(self, centred: Tensor, offset: Tensor) -> Tensor:
        """Undo ``split``: put the offset back. Exact up to rounding.

        Args:
            centred: [..., T, d], or a reconstruction of it.
            offset: as ``split`` returned it.
        """
        return centred + offset

    def _offset(self, keys: Tensor) -> Tensor:
        if self.method == "none":
            return keys.new_zeros(())
        if self.method == "dc":
            return keys.mean(dim=-1, keepdim=True)
        assert self.mean is not None  # checked when the centering was made
        offset = self.mean.unsqueeze(-2)
        if not _broadcasts_to(offset.shape, keys.shape):
            raise InputError(
                f"keys of shape {tuple(keys.shape)}: the fitted mean of shape "
                f"{tuple(self.mean.shape)} does not fit them"
            )
        return offset.to(keys.device)


def _check_method(method: str) -> None:
    if method not in CENTERING_METHODS:
        raise InputError(f"centering {method!r}: expected one of {', '.join(CENTERING_METHODS)}")


def _broadcasts_to(small: torch.Size, big: torch.Size) -> bool:
    if len(small) > len(big) or small[-1] != big[-1]:
        return False
    return all(s in (1, b) for s, b in zip(reversed(small), reversed(big)))
