"""Records: every measured number, with all that is needed to make it again.

A lab begins a run before its work and finishes it after::

    run = records.begin("ablation", "olmoe-mini", config=config, seeds=(0, 1))
    ...
    run.finish({"perplexity": Metric(12.3, n=4096, low=12.1, high=12.5)}).save()

and a chapter reads it: ``records.read("ablation", "olmoe-mini").metric("perplexity")``.
One record per (lab, model), in ``results/<lab>/<model>.json``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from signlattice.errors import InputError, IntegrityError
from signlattice.io import PROJECT, check_writable, content_hash, display_path, write_text

if TYPE_CHECKING:
    import torch

SCHEMA = 1
"""Version of the file format; a file of another version is refused."""

RESULTS = PROJECT / "results"
HASH = "content_hash"
"""Key of a record's hash of all its other keys; records of version 0.1.0 have none."""

DIGITS = 8
"""Significant digits kept of a float: more would be noise of the last bits in every diff."""

PACKAGES = ("torch", "transformers", "tokenizers", "triton", "numpy", "scipy", "signlattice")

Row = dict[str, Any]
"""A row of a table: each column a string, a number, a truth value or None."""


@dataclass(frozen=True)
class Metric:
    """A measured number with its sample size and its spread.

    ``n`` counts what ``value`` averages over (documents, keys, tokens or seeds: the name of the
    metric says which); ``std`` is a standard deviation over them; ``low`` and ``high`` bound an
    interval. A number that was counted, not sampled, has ``value`` alone.
    Raises ``InputError`` if a number is not finite or the interval is not one around the value.
    """

    value: float
    n: int | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for name in ("value", "std", "low", "high"):
            number = getattr(self, name)
            if number is None and name != "value":
                continue
            if not _is_number(number) or not math.isfinite(number):
                raise InputError(f"metric {name}={number!r}: use a finite number")
        if self.n is not None and (not isinstance(self.n, int) or self.n < 1):
            raise InputError(f"metric n={self.n!r}: use a count of 1 or more")
        if self.std is not None and self.std < 0:
            raise InputError(f"metric std={self.std!r}: use 0 or more")
        if (self.low is None) != (self.high is None):
            raise InputError("metric with one end of an interval: give both low and high")
        if self.low is None or self.high is None:
            return
        if not self.low <= self.value <= self.high:
            raise InputError(
                f"metric value={self.value!r} is outside its interval [{self.low!r}, {self.high!r}]"
            )


@dataclass(frozen=True)
class RunRecord:
    """Record what ran, on what, when, and what came out.

    ``metrics`` is a nested dictionary whose leaves are a `Metric` or a table (a tuple of rows with
    the same keys, each value a string, number, boolean or None). ``commit`` is None outside git;
    ``dirty`` says that tracked files differed from it. ``started`` is UTC, ISO 8601;
    ``seconds`` is wall time. Hashes are SHA-256, None where there is no model or no text;
    ``content_hash``, of all the rest, is None until the record is read from a file that has it.
    """

    lab: str
    model: str
    config: Mapping[str, Any]
    seeds: tuple[int, ...]
    commit: str | None
    dirty: bool | None
    model_id: str
    weights_hash: str | None
    token_hash: str | None
    device: str
    versions: Mapping[str, str]
    started: str
    seconds: float
    metrics: Mapping[str, Any]
    schema: int = SCHEMA
    content_hash: str | None = field(default=None, compare=False)

    def metric(self, name: str) -> Metric:
        """Return the metric at a dotted path such as ``"itq.none.beta"``. Raises ``InputError``."""
        return self._leaf(name, Metric, "metric")

    def table(self, name: str) -> tuple[Row, ...]:
        """Return the table at a dotted path, as rows. Raises ``InputError``."""
        return self._leaf(name, tuple, "table")

    def save(self, path: Path | None = None) -> Path:
        """Write the record whole, keys sorted, floats rounded, a hash added; return where it is.

        It goes to ``results/<lab>/<model>.json`` unless ``path`` says where. Raises ``InputError``
        if it cannot be written.
        """
        path = records_path(self.lab, self.model) if path is None else Path(path)
        names = [field.name for field in fields(self) if field.name != HASH]
        content = {name: _plain(getattr(self, name), name) for name in names}
        content[HASH] = content_hash(content)
        write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
        return path

    def _leaf(self, name: str, kind: type, word: str) -> Any:
        node: Any = self.metrics
        for step in name.split("."):
            if not isinstance(node, Mapping) or step not in node:
                found = ", ".join(node) if isinstance(node, Mapping) else f"a leaf before {step!r}"
                raise InputError(
                    f"{self.lab}/{self.model} has no {word} {name!r}: at {step!r} there is {found}"
                )
            node = node[step]
        if not isinstance(node, kind):
            raise InputError(f"{name!r} of {self.lab}/{self.model} is no {word}")
        return node


@dataclass(frozen=True)
class Run:
    """A run that has begun: everything of its record that is known before its metrics are."""

    known: Mapping[str, Any]
    clock: float

    def finish(
        self,
        metrics: Mapping[str, Any],
        *,
        seconds: float | None = None,
        weights_hash: str | None = None,
    ) -> RunRecord:
        """Return the record, its wall time up to now unless ``seconds`` says it (a resumed run).

        ``weights_hash`` is that of weights which the run itself has made.

        Raises ``InputError`` on a metric that is neither a `Metric`, a table nor a dictionary.
        """
        elapsed = time.perf_counter() - self.clock if seconds is None else seconds
        made = {} if weights_hash is None else {"weights_hash": weights_hash}
        known = {**self.known, **made}
        return RunRecord(**known, seconds=elapsed, metrics=_checked(metrics, "metrics"))


def begin(
    lab: str,
    model: str,
    *,
    config: Any,
    seeds: Sequence[int] = (),
    model_id: str | None = None,
    weights_hash: str | None = None,
    token_hash: str | None = None,
    device: str | torch.device = "cpu",
    results: Path = RESULTS,
) -> Run:
    """Note what is about to run, and check first that its record can be written.

    ``config`` is a dataclass or a dictionary of what was chosen; ``model_id`` is ``model`` unless
    it says more.
    Raises ``InputError`` if ``results/<lab>`` cannot be written to or a name is no plain word.
    """
    check_writable(records_path(lab, model, results).parent)
    from signlattice.evaluation.timing import device_name  # torch takes seconds to import

    commit, dirty = source_state()
    known = {
        "lab": lab,
        "model": model,
        "config": _as_dict(config),
        "seeds": tuple(seeds),
        "commit": commit,
        "dirty": dirty,
        "model_id": model if model_id is None else model_id,
        "weights_hash": weights_hash,
        "token_hash": token_hash,
        "device": device_name(device),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Run(known, time.perf_counter())


def records_path(lab: str, model: str, results: Path = RESULTS) -> Path:
    """``results/<lab>/<model>.json``. Raises ``InputError`` if a name would leave the folder."""
    for word, name in (("lab", lab), ("model", model)):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise InputError(f"{word} {name!r}: use letters, digits, '.', '_' and '-'")
    return Path(results) / lab / f"{model}.json"


def read(lab: str, model: str, results: Path = RESULTS) -> RunRecord:
    """Read the record of a lab on a model. Raises ``InputError`` that says how to make one."""
    path = records_path(lab, model, results)
    if not path.exists():
        raise InputError(
            f"no record {display_path(path)}: make it with `make lab LAB={lab} MODEL={model}`"
        )
    record = load(path)
    if (record.lab, record.model) != (lab, model):
        raise IntegrityError(
            f"{display_path(path)} is the record of {record.lab}/{record.model}: "
            f"make its own with `make lab LAB={lab} MODEL={model}`"
        )
    return record


def every(results: Path = RESULTS) -> tuple[RunRecord, ...]:
    """All records, by lab and model. Raises as `read` does if one is none or is misplaced."""
    paths = sorted(Path(results).glob("*/*.json"))
    return tuple(read(path.parent.name, path.stem, results) for path in paths)


def as_saved(config: Any) -> dict[str, Any]:
    """Return a configuration as a record's file holds it, to be compared with one that was read.

    Raises ``InputError`` on what a record cannot hold.
    """
    return _plain(_as_dict(config), "config")


def load(path: Path) -> RunRecord:
    """Read one record file.

    Raises ``InputError`` if it is missing, ``IntegrityError`` if it is no record of this schema or
    is not what was written.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the record {display_path(path)} ({error.strerror})"
        ) from None
    except ValueError:
        raise IntegrityError(
            f"{display_path(path)} is not JSON: restore it or rerun its lab"
        ) from None
    try:
        record = _record(content)
    except InputError as error:
        raise IntegrityError(f"{display_path(path)} is no record: {error}") from None
    expected = content.pop(HASH, None)
    if expected is not None and content_hash(content) != expected:
        raise IntegrityError(
            f"{display_path(path)} was changed after it was written: restore it or rerun its lab"
        )
    return record


def source_state(project: Path = PROJECT) -> tuple[str | None, bool | None]:
    """Commit of the source tree, and whether tracked files differ; (None, None) outside git."""
    top = _git(project, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != Path(project).resolve():
        return None, None  # not a checkout: perhaps installed inside somebody else's repository
    commit = _git(project, "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(_git(project, "status", "--porcelain", "--untracked-files=no"))


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _as_dict(config: Any) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    return dict(cast(Mapping[str, Any], config))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked(node: Any, name: str) -> Any:
    """Freeze the tables in a node of the metrics. Raises ``InputError`` on anything else."""
    if isinstance(node, Metric):
        return node
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str) or not key or "." in key:
                raise InputError(f"{name} has the key {key!r}: use a name without dots")
        return {key: _checked(child, f"{name}.{key}") for key, child in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        return tuple(_checked_row(row, f"{name}[{i}]", node[0]) for i, row in enumerate(node))
    raise InputError(f"{name} is a {type(node).__name__}: use a Metric, a table or a dictionary")


def _checked_row(row: Any, name: str, first: Any) -> Row:
    if not isinstance(row, Mapping) or not isinstance(first, Mapping) or set(row) != set(first):
        raise InputError(f"{name}: use rows that are dictionaries with the same keys")
    for key, value in row.items():
        if not (value is None or isinstance(value, (str, bool)) or _is_number(value)):
            raise InputError(f"{name}.{key} is a {type(value).__name__}: use a plain scalar")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}.{key} is {value!r}: use a finite number, or None for none")
    return dict(row)


def _plain(value: Any, name: str) -> Any:
    """Return a value as JSON: floats rounded, tuples as lists, a metric without its blanks."""
    if isinstance(value, Metric):
        return {key: _plain(v, key) for key, v in asdict(value).items() if v is not None}
    if isinstance(value, Mapping):
        return {str(key): _plain(child, f"{name}.{key}") for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child, f"{name}[{i}]") for i, child in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{name} is {value!r}: use a finite number, or None for none")
        return float(f"{value:.{DIGITS}g}")
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Path):
        return display_path(value)
    raise InputError(f"{name} is a {type(value).__name__}: a record holds plain values only")


_KINDS: dict[str, tuple[type, ...]] = {
    "lab": (str,),
    "model": (str,),
    "config": (dict,),
    "seeds": (list,),
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
    "model_id": (str,),
    "weights_hash": (str, type(None)),
    "token_hash": (str, type(None)),
    "device": (str,),
    "versions": (dict,),
    "started": (str,),
    "seconds": (int, float),
    "metrics": (dict,),
    HASH: (str, type(None)),
}


def _record(content: Any) -> RunRecord:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else None
        raise InputError(f"schema {found!r}, this version reads {SCHEMA}")
    known: Row = {HASH: None}
    known |= {name: value for name, value in content.items() if name != "schema"}
    if missing := sorted(set(_KINDS) - set(known)):
        raise InputError(f"it lacks {', '.join(missing)}")
    if surplus := sorted(set(known) - set(_KINDS)):
        raise InputError(f"it has the unknown {', '.join(surplus)}")
    for name, kinds in _KINDS.items():
        if not isinstance(known[name], kinds):
            raise InputError(f"{name} is a {type(known[name]).__name__}")
    metrics = _checked(_metrics(known["metrics"]), "metrics")
    return RunRecord(**known | {"seeds": tuple(known["seeds"]), "metrics": metrics})


def _metrics(node: Any) -> Any:
    """JSON back to metrics: a dictionary whose ``value`` is a number is a `Metric`."""
    if not isinstance(node, dict):
        return node
    if not _is_number(node.get("value")):
        return {key: _metrics(child) for key, child in node.items()}
    try:
        return Metric(**node)
    except TypeError:
        raise InputError(f"a metric has the keys {', '.join(sorted(node))}") from None
