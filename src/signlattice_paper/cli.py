"""The command line of the paper: execute notebooks, check them, check the records, prepare a lab.

::

    signlattice-paper run book/s1_*.ipynb [-p NAME VALUE] [--out FOLDER] [--times]
    signlattice-paper normalise book/*.ipynb
    signlattice-paper check book/*.ipynb
    signlattice-paper records [--before-run]
    torchrun --nproc-per-node 8 -m signlattice_paper prepare OLMoE-1B-7B

Exit codes: 0 success, 1 an error that is told in a line each, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from signlattice.data.texts import read_text
from signlattice.distributed.workers import Workers
from signlattice.errors import InputError
from signlattice.io import PROJECT, display_path
from signlattice_paper import notebooks, records


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except (InputError, notebooks.NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no file is left half written", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(
        "signlattice-paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="execute notebooks and normalise them")
    run.add_argument("notebooks", nargs="+", type=Path)
    run.add_argument(
        "--times", action="store_true", help="record how long each took, in results/run_times"
    )
    run.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write there, and leave the notebooks alone"
    )
    run.add_argument(
        "-p",
        dest="values",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of every notebook that is run; a text is taken as it is",
    )
    run.set_defaults(run=_run)
    normalise = commands.add_parser("normalise", help="write notebooks in their canonical form")
    normalise.add_argument("notebooks", nargs="+", type=Path)
    normalise.set_defaults(run=_normalise)
    check = commands.add_parser("check", help="say what keeps notebooks from being published")
    check.add_argument("notebooks", nargs="+", type=Path)
    check.set_defaults(run=_check)
    stale = commands.add_parser("records", help="check that records are as their labs would be now")
    stale.add_argument(
        "--before-run",
        action="store_true",
        help="the chapters will be executed: do not look at what they show",
    )
    stale.set_defaults(run=_records)
    prepare = commands.add_parser(
        "prepare", help="capture keys and fit rotations by several processes; make lab goes on"
    )
    prepare.add_argument(
        "model", help="a mini, a model of the paper, a name on the hub or a folder"
    )
    prepare.add_argument("--profile", choices=("mini", "full"), default="full")
    prepare.add_argument("--text", default="", help="the profile's own, unless given")
    prepare.add_argument("--context", type=int, default=0, help="tokens of a window")
    prepare.add_argument("--revision", default="", help="branch, tag or commit on the hub")
    prepare.add_argument("--dtype", default="auto", help="of the loaded weights")
    prepare.set_defaults(run=_prepare)
    return top


def _run(options: argparse.Namespace) -> int:
    values = dict(options.values)
    timing = notebooks.run_all(options.notebooks, values, times=options.times, out=options.out)
    if timing is not None:
        print(timing.save())
    return 0


def _normalise(options: argparse.Namespace) -> int:
    for path in options.notebooks:
        changed = notebooks.normalise_file(path)
        print(f"{display_path(path)}: {'normalised' if changed else 'unchanged'}")
    return 0


def _check(options: argparse.Namespace) -> int:
    faults = [line for path in options.notebooks for line in notebooks.problems(path)]
    print("\n".join(faults) or f"{len(options.notebooks)} notebooks ready")
    return 1 if faults else 0


def _records(options: argparse.Namespace) -> int:
    from signlattice_paper import provenance  # here: notebooks need not wait for transformers

    faults = provenance.faults(before_run=options.before_run)
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    if not faults:
        print(f"{len(records.every())} records, each as its lab would make it")
    return 1 if faults else 0


def _prepare(options: argparse.Namespace) -> int:
    from signlattice_paper.experiments import architectures

    with Workers.current() as workers:
        config = architectures.configured(options.profile, options.text, options.context)
        loaded = architectures.load(
            options.model,
            config,
            revision=options.revision,
            dtype=options.dtype,
            device_map=workers.device if workers.count > 1 else "auto",
        )
        scratch = PROJECT / "scratch" / "architectures"
        tell = print if workers.leads else None
        architectures.prepare(loaded, read_text(config.text), config, scratch, tell, workers)
    return 0
