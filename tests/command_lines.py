"""Command lines at the edge, for the tests and for the probe."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from signlattice.cli import main

Line = tuple[str, ...]
TEXTS = (
    "",
    " ",
    "-1",
    "0",
    "1e9",
    "x",
    "nan",
    "9" * 30,
    "é\0",
    "a" * 5000,
    "/",
    "../..",
    "\x1b[31m",
)
NUMBERS = {
    "bench": ("--tokens", "--heads", "--head-dim", "--group", "--batch", "--rounds"),
    "estimate": ("--context", "--tokens"),
}
CODEC_COMMANDS = ("measure", "evaluate", "generate")


def command_lines(folder: Path) -> list[Line]:
    """Return lines of which none should run for long; ``folder`` is empty and may be written."""
    lines: list[Line] = [(), ("--help",), ("none-such",)]
    for text in TEXTS:
        lines += [(text,), ("inspect", text), ("estimate", text), ("estimate", "olmoe-mini", text)]
        lines += [("estimate", "olmoe-mini", "--dtype", text)]
        lines += [("estimate", "olmoe-mini", "--revision", text)]
        lines += [("learn", text, "-o", str(folder / "codec"), "--text", str(folder))]
        lines += [
            ("learn", "olmoe-mini", "-o", str(folder / "codec"), "--text", text, "--seed", "x")
        ]
        lines += [("learn", "olmoe-mini", "-o", str(folder), "--device", text)]
        for command, names in NUMBERS.items():
            lines += [(command, *["olmoe-mini"] * (command == "estimate"), n, text) for n in names]
        for command in CODEC_COMMANDS:
            prompt = ("def f(x):",) if command == "generate" else ()
            lines += [(command, "olmoe-mini", text, *prompt), (command, text, str(folder), *prompt)]
    return [line for line in lines if line[:1] != ("bench",) or line[-1] not in ("1e9",)]


def told(line: Line) -> str | None:
    """Run a command: None if it succeeds or says in one line why not, else what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(line)
    except SystemExit as stop:  # of argparse: help, or wrong usage
        return None if stop.code in (0, 2) else f"it ends with {stop.code}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    message = err.getvalue()
    if code == 0 and out.getvalue():
        return None
    if code == 1 and message.startswith("signlattice: ") and message.rstrip("\n").isprintable():
        return None
    return f"it ends with {code} and says {message[-100:]!r}"
