"""The two ways in which an input can be wrong."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one line: it names the value and says what would be right."""


class IntegrityError(InputError):
    """A file, model or corpus is not the one that was expected."""
