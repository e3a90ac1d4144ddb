"""The two ways in which an input can be wrong, and what tells that its type is."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class InputError(ValueError):
    """Bad input, told in one line: it names the value and says what would be right.

    Example:
        >>> from signlattice import InputError, LearnConfig
        >>> try:
        ...     LearnConfig(solver="newton")
        ... except InputError as error:
        ...     print(error)
        solver='newton': choose one of annealed, itq, gradient
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


def check_counts(config: object, *names: str, least: int = 1) -> None:
    """Raise ``InputError`` if one of these attributes is below ``least``; None is not."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{name}={value}: use {least} or more")


def check_types(config: object) -> None:
    """Raise ``InputError`` unless every field of a dataclass is of the type that it declares.

    NumPy's numbers are numbers, an integer is a float, and a bool is neither.
    """
    given = {field.name: getattr(config, field.name) for field in fields(config)}  # pyright: ignore
    _check(given, _hints(type(config)))


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function raise ``InputError`` on an argument that is not of the type it declares."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _check(signature.bind(*args, **kwargs).arguments, _hints(function))
        return function(*args, **kwargs)

    return call


_LISTS = (list, Sequence, Collection)

_hints = functools.cache(typing.get_type_hints)


def _check(given: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in hints and not _is(value, hints[name]):
            kind = _named(hints[name])
            verb = "choose" if kind.startswith("one of") else "expected"
            raise InputError(f"{name}={_shown(value)}: {verb} {kind}")


def _is(value: Any, hint: Any) -> bool:
    """Say whether a value is of a type; what a mapping holds is not looked at."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if kind in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if kind is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind is tuple and isinstance(value, tuple):
        same = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(same) == len(value) and all(map(_is, value, same))
    if kind in _LISTS:
        listed = isinstance(value, kind) and not isinstance(value, (str, bytes))
        return listed and not hasattr(value, "dtype") and all(_is(item, parts[0]) for item in value)
    if hint in (int, float):
        number = Integral if hint is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind or hint)


def _named(hint: Any) -> str:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_named, parts))
    if kind is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind is tuple:
        if parts[1:] == (...,):
            return f"a tuple of {_named(parts[0]).removeprefix('a ').removeprefix('an ')}s"
        return f"a tuple of {', '.join(map(_named, parts))}"
    if kind in _LISTS:
        return f"a list of {_named(parts[0])}"
    known = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}
    return known.get(hint) or ("None" if hint is type(None) else (kind or hint).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    plain = len(text) <= 60 and text.isprintable() and not text.startswith("<")
    return text if plain else f"<{type(value).__name__}>"
