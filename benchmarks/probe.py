"""Try many inputs at the edges of the library, by kind: `make probe`.

A kind is a function that yields its inputs, each with what is wrong with its outcome: None where it
works or is refused in one line. The inputs are those of the tests, a share of each kind, drawn in
a fixed order so that kinds fit their share of the time; ``--all`` takes every one of them.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

import call_arguments  # noqa: E402
from call_arguments import calls  # noqa: E402
from codec_files import flipped  # noqa: E402
from command_lines import command_lines, told  # noqa: E402
from edges import wrong  # noqa: E402
from key_numbers import keys_of_any_size  # noqa: E402
from mask_forms import masks_of_any_form  # noqa: E402
from model_folders import damaged, damages, read  # noqa: E402
from signlattice import KeyCodec  # noqa: E402
from signlattice.models.loading import MODELS, load_model  # noqa: E402

Outcome = tuple[str, str | None]
SECONDS = 240.0
"""For all kinds, an equal share for each, unless all inputs are asked for."""


def model_folders(work: Path) -> Iterator[Outcome]:
    """Folders of models that are damaged, foreign or absurd."""
    cases = damages()
    for name in shuffled(cases):
        folder = damaged(MODELS / "olmoe-mini", cases[name], work / "model")
        for full in (False, True):
            yield (
                f"{name}, {'load_full' if full else 'load_model'}",
                wrong(lambda: read(folder, full)),
            )


def codec_files(work: Path) -> Iterator[Outcome]:
    """Codec files with one bit flipped: refused, for each carries the hash of what it holds."""
    file = work / "codec.safetensors"
    for name, content in flipped((MODELS / "olmoe-mini" / "lattice.safetensors").read_bytes()):
        file.write_bytes(content)
        accepted: list[KeyCodec] = []
        fault = wrong(lambda: accepted.append(KeyCodec.load(file)))
        yield name, "it is accepted" if accepted else fault


def arguments(work: Path) -> Iterator[Outcome]:
    """Arguments of the command line."""
    for line in shuffled(command_lines(work)):
        yield " ".join(line)[:80], told(line)


def calls_of_public_names(work: Path) -> Iterator[Outcome]:
    """Calls of every public name with an argument of a wrong type, or a value of no use."""
    loaded = load_model("olmoe-mini")
    every = [case for name in call_arguments.good(loaded) for case in calls(loaded, name)]
    for name, call in shuffled(every):
        yield name, wrong(call)


def numbers(work: Path) -> Iterator[Outcome]:
    """Keys of any size, and ones that are no numbers, through every code and scale rule."""
    for name, attempt in shuffled(keys_of_any_size()):
        yield name, wrong(attempt)


def masks(work: Path) -> Iterator[Outcome]:
    """Masks of every form under a cache that rounds nothing, beside transformers' own."""
    for name, attempt in shuffled(masks_of_any_form()):
        yield name, wrong(attempt)


KINDS: tuple[Callable[[Path], Iterator[Outcome]], ...] = (
    model_folders,
    codec_files,
    arguments,
    calls_of_public_names,
    numbers,
    masks,
)


def shuffled(cases) -> list:
    """Return the cases in an order that is the same every time, whatever is reached of it."""
    cases = list(cases)
    random.Random(0).shuffle(cases)
    return cases


def main() -> int:
    """Try the kinds that are named and print the table; 1 if an outcome is wrong."""
    names = {kind.__name__: kind for kind in KINDS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[*names, []], default=[])
    parser.add_argument("--all", action="store_true", help="every input, however long it takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, rows = [], []
    for name in options.kinds or names:
        n, n_wrong, until = 0, 0, time.monotonic() + SECONDS / len(KINDS)
        with tempfile.TemporaryDirectory() as work:
            for case, fault in names[name](Path(work)):
                n += 1
                if fault is not None:
                    n_wrong += 1
                    found.append(f"{name}: {case}: {fault}")
                if time.monotonic() > until and not options.all:
                    break
        rows.append((name.replace("_", " "), n, n_wrong))
    print(*found, sep="\n", end="\n\n" if found else "")
    print(f"{'kind':16}{'inputs':>8}{'wrong':>8}")
    for name, n, n_wrong in rows:
        print(f"{name:16}{n:8}{n_wrong:8}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
