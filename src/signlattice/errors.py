"""The two ways in which an input can be wrong."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one line: it names the value and says what would be right.

    Example:
        >>> from signlattice import InputError, LearnConfig
        >>> try:
        ...     LearnConfig(solver="newton")
        ... except InputError as error:
        ...     print(error)
        unknown solver 'newton': choose one of annealed, itq, gradient
    """


class IntegrityError(InputError):
    """A file, model or corpus is not the one that was expected.

    Example:
        >>> from signlattice import IntegrityError, KeyCodec
        >>> from signlattice.models.loading import MODELS
        >>> try:
        ...     KeyCodec.load(MODELS / "olmoe-mini" / "lattice.safetensors", model_hash="f" * 64)
        ... except IntegrityError as error:
        ...     print(error)
        this codec was fitted on the model e20beb886666…, not on ffffffffffff…:
        fit one for this model
    """


def check_counts(config: object, *names: str) -> None:
    """Raise ``InputError`` if one of these attributes is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)}: use 1 or more")
