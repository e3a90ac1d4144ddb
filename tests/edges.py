"""What may come of an input at the edge: it works, or one line says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

from signlattice.errors import InputError


def wrong(attempt: Callable[[], object]) -> str | None:
    """Run ``attempt``: None where it works or raises ``InputError`` in a line, else what it does.

    An attempt that asserts, with a message or without, is one whose result is wrong.
    """
    try:
        attempt()
    except InputError as error:
        line = str(error)
        return None if line.strip() and line.isprintable() else f"no line of text: {line!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None
