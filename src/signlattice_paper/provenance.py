"""Is every record the one that its lab would make now? One line for each that is not.

``signlattice-paper records [--before-run]`` asks, and so does every build of the book.

A record is stale if it has no hash of its content, or if the model's weights, the text, the seeds
or the configuration that it names are not those that its lab notebook would use; the lab is read
for that, not run. Some labs owe a record for every model in ``models/``, the others for the one
that they name. A claim or a chapter that names a record which is not there, and a chapter whose
tables are of an earlier run of a lab, are told as well; the last not with ``--before-run``, since
the chapters are about to be executed.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signlattice.errors import InputError
from signlattice.io import PROJECT, require_checkout
from signlattice.models.checkpoint import weights_hash
from signlattice.models.gguf import PACKAGED_MODELS
from signlattice_paper import notebooks, records
from signlattice_paper.claims import load_claims
from signlattice_paper.records import RunRecord
from signlattice_paper.tables import stamp

READ = re.compile(r"""records\.read\(\s*["']([\w.-]+)["'],\s*["']([\w.-]+)["']""")
SHOWN = re.compile(r"\(/(results/[\w.-]+/[\w.-]+\.json)\) of (\d{4}-\d\d-\d\d \d\d:\d\d UTC)")


EVERY_MODEL = ("train", "architectures", "cache", "gauge", "ladder")
"""Labs that owe a record for every mini; the others owe one for the model that they name."""


Page = tuple[str, notebooks.NotebookNode]
"""A notebook with its path in the project."""

_NO_HASH = ["it has no hash of its content"]


@dataclass(frozen=True)
class Expected:
    """What a lab would write into its record before it measures anything."""

    config: Mapping[str, Any]
    seeds: tuple[int, ...]
    token_hash: str | None
    has_weights: bool


def faults(project: Path = PROJECT, *, before_run: bool = False) -> list[str]:
    """One line for each record that is missing or stale, and for each use of one that is.

    ``before_run`` leaves out what the chapters show, since that is about to be made.
    """
    project = Path(project)
    found = []
    labs = sorted((require_checkout(project / "book") / "lab").glob("*.ipynb"))
    minis = sorted(file.parent.name for file in (project / "models").glob("*/config.json"))
    for lab in labs:
        owed = minis if lab.stem in EVERY_MODEL else _named_model(lab)
        there = {path.stem for path in (project / "results" / lab.stem).glob("*.json")}
        for model in sorted({*owed, *(there & set(minis))}):
            found += _lab_faults(lab, model, project)
    for path in sorted((project / "results").glob("*/*.json")):
        if path.parent.name not in {lab.stem for lab in labs}:
            found += _other_faults(path, project)
    pages = list(_pages(project))
    found += [*_claim_faults(project), *_reading_faults(pages, project)]
    return found if before_run else [*found, *_showing_faults(pages, project)]


def expected(lab: Path, model: str) -> Expected:
    """Read off a lab notebook what its run on ``model`` would be.

    The notebook calls ``records.begin`` once; its arguments, and the imports and assignments that
    they need, are evaluated, nothing else is. Raises ``InputError`` if there is no such call, it is
    not of this lab, or a name that it needs is made in another way.
    """
    nb = notebooks.read(lab)
    sources = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    plain = [re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE) for source in sources]
    statements = [node for source in plain for node in ast.parse(source).body]
    call = _begin(statements)
    if not call.args or getattr(call.args[0], "value", None) != lab.stem:
        raise InputError(f"its records.begin must be given its own name, {lab.stem!r}")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    known = _Names(statements, {"model": model})
    told = {
        name: known.value(given[name])
        for name in ("config", "seeds", "token_hash")
        if name in given
    }
    return Expected(
        config=records.as_saved(told.get("config", {})),
        seeds=tuple(told.get("seeds", ())),
        token_hash=told.get("token_hash"),
        has_weights="weights_hash=" in "".join(sources),
    )


def _named_model(lab: Path) -> list[str]:
    """Return the model in a lab's parameters."""
    model = notebooks.parameters(notebooks.read(lab)).get("model")
    return [] if model is None else [model]


def _lab_faults(lab: Path, model: str, project: Path) -> list[str]:
    try:
        record = records.read(lab.stem, model, project / "results")
    except InputError as error:
        return [str(error)]
    try:
        wanted = expected(lab, model)
        weights = _weights(model, project) if wanted.has_weights else None
    except Exception as error:  # a lab's own code may raise anything
        return [f"book/lab/{lab.name} on {model} cannot be checked: {error}"]
    stale = _differences("config", record.config, wanted.config)
    stale += _NO_HASH if record.content_hash is None else []
    for name, ours, theirs in (
        ("weights_hash", record.weights_hash, weights),
        ("token_hash", record.token_hash, wanted.token_hash),
        ("seeds", record.seeds, wanted.seeds),
    ):
        if ours != theirs:
            stale.append(f"{name} is {_short(ours)}, now {_short(theirs)}")
    again = f"make it again with `make lab LAB={lab.stem} MODEL={model}`"
    return [f"{_name(record)} is stale: {why}; {again}" for why in stale]


def _weights(model: str, project: Path) -> str:
    """Hash a model's weights; of a packaged one, which need not be here, the hash is known."""
    packaged = PACKAGED_MODELS.get(model)
    return packaged.weights_hash if packaged else weights_hash(project / "models" / model)


def _other_faults(path: Path, project: Path) -> list[str]:
    """Check a record that no lab notebook makes: its form, and its model's weights."""
    try:
        record = records.read(path.parent.name, path.stem, project / "results")
        if record.content_hash is None:
            return [f"{_name(record)} is stale: {_NO_HASH[0]}; run its program again"]
        folder = project / "models" / record.model
        if record.weights_hash is None or not folder.is_dir():
            return []
        weights = weights_hash(folder)
    except InputError as error:
        return [str(error)]
    if record.weights_hash == weights:
        return []
    ours, now = _short(record.weights_hash), _short(weights)
    return [f"{_name(record)} is stale: weights_hash is {ours}, now {now}; run its program again"]


def _claim_faults(project: Path) -> Iterator[str]:
    for claim in load_claims(project / "claims.yml").values():
        if claim.record and not (project / claim.record).is_file():
            yield f"claim {claim.id} names the record {claim.record}, which does not exist"


def _reading_faults(pages: list[Page], project: Path) -> Iterator[str]:
    """Name the records that chapters and labs read and that are not there."""
    for name, nb in pages:
        for lab, model in READ.findall("\n".join(cell.source for cell in nb.cells)):
            path = records.records_path(lab, model, project / "results")
            if not path.is_file():
                yield f"{name} reads the record results/{lab}/{model}.json, which does not exist"


def _showing_faults(pages: list[Page], project: Path) -> Iterator[str]:
    """Name the tables of chapters and labs that were made from an earlier run."""
    stamps: dict[str, str] = {}
    for name, nb in pages:
        outputs = [output for cell in nb.cells for output in cell.get("outputs", [])]
        text = "\n".join(output.get("data", {}).get("text/markdown", "") for output in outputs)
        for file, shown in sorted(set(SHOWN.findall(text))):
            if file not in stamps:
                stamps[file] = _stamp(project / file)
            if stamps[file] != shown:
                now = stamps[file]
                yield f"{name} shows {file} of {shown}, it is of {now}: run the chapter again"


def _stamp(file: Path) -> str:
    """Return the stamp of a record, or why it has none."""
    try:
        return stamp(records.load(file))
    except InputError as error:
        return f"none ({error})"


def _pages(project: Path) -> Iterator[Page]:
    for path in sorted((project / "book").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            yield path.relative_to(project).as_posix(), notebooks.read(path)


def _differences(word: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    found = []
    for name in sorted({*ours, *theirs}):
        if name not in ours:
            found.append(f"{word} lacks {name}, now {_short(theirs[name])}")
        elif name not in theirs:
            found.append(f"{word} has {name}, which the lab has no more")
        elif ours[name] != theirs[name]:
            found.append(f"{word} {name} is {_short(ours[name])}, now {_short(theirs[name])}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}…"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _name(record: RunRecord) -> str:
    return f"results/{record.lab}/{record.model}.json"


def _begin(statements: list[ast.stmt]) -> ast.Call:
    calls = [
        node
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "records.begin"
    ]
    if len(calls) != 1:
        raise InputError(f"it calls records.begin {len(calls)} times: use one")
    return calls[0]


class _Names:
    """The names that a notebook's imports and assignments define, evaluated when asked for."""

    def __init__(self, statements: list[ast.stmt], values: dict[str, Any]) -> None:
        self._space = dict(values)
        self._made = {name: made for node in statements for name, made in _definitions(node)}

    def value(self, expression: ast.expr) -> Any:
        """Evaluate an expression of known names. Raises ``InputError`` on an unknown one."""
        self._define(expression)
        return eval(compile(ast.Expression(expression), "<lab>", "eval"), self._space)

    def _define(self, node: ast.AST) -> None:
        names = [child for child in ast.walk(node) if isinstance(child, ast.Name)]
        own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        for name in (n.id for n in names if isinstance(n.ctx, ast.Load)):
            if name in own or name in self._space or hasattr(builtins, name):
                continue
            if name not in self._made:
                raise InputError(f"{name!r} is neither imported nor assigned")
            self._define(self._made[name])
            module = ast.Module([self._made[name]], [])
            exec(compile(ast.fix_missing_locations(module), "<lab>", "exec"), self._space)


def _definitions(node: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a statement defines, each with what is to be run for it."""
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, ast.ImportFrom(node.module, [alias], node.level)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], ast.Import([alias])
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for child in (child for target in targets for child in ast.walk(target)):
            if isinstance(child, ast.Name):
                yield child.id, node
