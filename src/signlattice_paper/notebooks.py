"""Chapters and labs as files: executed, and written so that a second run changes no byte."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import write_kernel_spec
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from signlattice.errors import InputError, IntegrityError
from signlattice.io import PROJECT, check_writable, display_path, write_text
from signlattice_paper import records
from signlattice_paper.records import Metric, RunRecord

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
"""What a kernel says of itself, without its patch version, which differs between machines."""

NOTEBOOK_NOISE = ("papermill", "signature", "vscode", "toc")
CELL_NOISE = ("papermill", "execution", "ExecuteTime", "vscode", "collapsed", "scrolled")

OURS = "signlattice"
"""Metadata of a notebook that `run` writes: what code its outputs are of."""

PARAMETERS = "parameters"
INJECTED = "injected-parameters"
PROGRESS = "progress"
"""Tag of a cell whose stderr is a progress bar: shown while it runs, and not kept."""


TIMES = ("run_times", "book")
"""Lab and model of the record that says how long each notebook took."""


class NotebookError(RuntimeError):
    """A cell failed or its kernel died; explained in one line, and the file is as it was before."""


def read(path: Path) -> NotebookNode:
    """Read a notebook. Raises ``InputError`` if it is missing, ``IntegrityError`` if it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read the notebook {display_path(path)} ({error.strerror})"
        ) from None
    try:
        return nbformat.reads(text, as_version=4)
    except Exception:  # nbformat raises whatever its parser or its schema raises
        raise IntegrityError(
            f"{display_path(path)} is not a notebook (.ipynb, version 4)"
        ) from None


def parameters(nb: NotebookNode) -> dict[str, Any]:
    """Names and defaults of the cell tagged ``parameters``: its assignments of plain values."""
    found = {}
    for node in (node for cell in _tagged(nb, PARAMETERS) for node in ast.parse(cell.source).body):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = ast.literal_eval(node.value)
    return found


def run(
    path: Path,
    values: Mapping[str, Any] | None = None,
    *,
    progress: str | bool = True,
    out: Path | None = None,
) -> None:
    """Execute a notebook with the running interpreter and normalise it: in place, or into ``out``.

    ``values`` replace parameters of the cell tagged ``parameters``, verbatim where the default is a
    text; a value equal to its default leaves no trace in the file. ``progress`` shows a bar of
    cells, under that name if it is one, and what cells write to stderr as they write it.

    Raises ``InputError`` on a parameter that the notebook does not have or of another type, and
    `NotebookError` if a cell fails. The file is replaced at the end or not at all.
    """
    path = Path(path)
    target = path if out is None else Path(out) / path.name
    check_writable(target.parent)
    nb = _without_injected(read(path))
    changed = _changed_parameters(nb, values or {}, path)
    bar = {"desc": progress if isinstance(progress, str) else path.stem} if progress else False
    try:
        with _own_kernel():
            executed = papermill.execute_notebook(
                nb,
                None,
                changed,
                kernel_name="python3",
                language="python",
                cwd=path.parent,
                progress_bar=cast(Any, bar),  # arguments of tqdm, too
                stderr_file=sys.stderr if progress else None,
            )
    except PapermillExecutionError as error:
        raise NotebookError(_failure(path, error)) from None
    except (CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(
            f"{display_path(path)}: the kernel stopped: {_one_line(str(error))}"
        ) from None
    executed.metadata[OURS] = {"executed": fingerprint(executed)}
    write_text(target, to_text(normalise(executed)))


def fingerprint(nb: NotebookNode) -> str:
    """Hash the code of a notebook: what `run` executed, and what `problems` finds edited since."""
    code = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def normalise(nb: NotebookNode) -> NotebookNode:
    """Return a copy with all that differs between two equal runs taken out or made canonical.

    Timings and editor metadata go; cells count from 1; kernel, widget ids, memory addresses, the
    chunks in which a stream arrived and the creation date of an SVG get one form. A cell tagged
    ``progress`` keeps nothing of its stderr.
    """
    nb = copy.deepcopy(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    for name in NOTEBOOK_NOISE:
        nb.metadata.pop(name, None)
    nb.metadata["kernelspec"] = dict(KERNEL)
    nb.metadata["language_info"] = copy.deepcopy(LANGUAGE)
    _name_cells(nb)
    _number_cells(nb)
    for cell in nb.cells:
        for name in CELL_NOISE:
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = _merged_streams(_without_progress(cell))
            for output in cell.outputs:
                _canonical_output(output)
    return _canonical_widgets(nb)


def to_text(nb: NotebookNode) -> str:
    """Return the notebook as its file holds it: sorted keys, one trailing newline."""
    return nbformat.writes(nb).rstrip("\n") + "\n"


def normalise_file(path: Path) -> bool:
    """Normalise a file in place; return whether that changed it."""
    text = to_text(normalise(read(path)))
    if text == Path(path).read_text(encoding="utf-8"):
        return False
    write_text(path, text)
    return True


def problems(path: Path) -> tuple[str, ...]:
    """List what keeps a notebook from being published, one line each; none if ready.

    A published notebook is normalised, every code cell has run in order, as it is now, and none has
    failed.
    """
    nb = read(path)
    found = []
    code = [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code"]
    ran = [cell.execution_count for _, cell in code if cell.source.strip()]
    if ran != list(range(1, len(ran) + 1)):
        found.append("not executed from top to bottom: run it with `run`")
    if nb.metadata.get(OURS) != {"executed": fingerprint(nb)}:
        found.append("its code was edited after it ran: run it again with `run`")
    for index, cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {index} failed: {output.ename}: {_one_line(output.evalue)}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {index} wrote to stderr: {_one_line(output.text)}")
    if to_text(normalise(nb)) != Path(path).read_text(encoding="utf-8"):
        found.append("not normalised: write it with `normalise`")
    return tuple(f"{display_path(path)}: {line}" for line in found)


def run_all(
    paths: Sequence[Path],
    values: Mapping[str, Any] | None = None,
    *,
    out: Path | None = None,
    times: bool = False,
) -> RunRecord | None:
    """Execute notebooks one after the other, as `run` does each.

    ``times`` returns a record of how long each took and of the size of the environment. Raises as
    `run` does; a wrong parameter of any notebook is found before the first one is executed.
    """
    values = dict(values or {})
    for path in paths:
        _changed_parameters(read(path), values, path)
    timing = records.begin(*TIMES, config=values) if times else None
    rows = []
    for number, path in enumerate(paths, start=1):
        started = time.perf_counter()
        run(path, values, progress=f"[{number}/{len(paths)}] {display_path(path)}", out=out)
        rows.append({"notebook": display_path(path), "seconds": time.perf_counter() - started})
    if timing is None:
        return None
    size = Metric(environment_bytes() / 1e9)
    return timing.finish({"notebooks": rows, "environment_gigabytes": size})


def environment_bytes(folder: Path = Path(sys.prefix)) -> int:
    """Bytes of all files of an environment, this interpreter's unless another is given."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def _changed_parameters(nb: NotebookNode, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the values that differ from the notebook's defaults, checked against them.

    A text, as the command line gives each value, stands verbatim where the default is a text, and
    is read as YAML where it is something else.
    """
    if not values:
        return {}
    try:
        defaults = parameters(nb)
    except (SyntaxError, ValueError):
        raise InputError(
            f"{display_path(path)}: its parameters cell must hold plain values"
        ) from None
    given = {}
    for name, value in values.items():
        if name not in defaults:
            valid = ", ".join(defaults) or "none: no cell is tagged 'parameters'"
            raise InputError(f"{display_path(path)} has no parameter {name!r}; it has {valid}")
        default = defaults[name]
        if isinstance(value, str) and not isinstance(default, str):
            value = _plain(value)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (
            not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise InputError(
                f"{display_path(path)}: parameter {name}={value!r} must be "
                f"of type {type(default).__name__}, as its default {default!r}"
            )
        given[name] = value
    return {name: value for name, value in given.items() if value != defaults[name]}


def _plain(text: str) -> Any:
    """Read a value that is no text; what is no YAML stays a text."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that there is not, [[[[…
        return text


def _tagged(nb: NotebookNode, tag: str) -> list[NotebookNode]:
    return [c for c in nb.cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]


def _without_injected(nb: NotebookNode) -> NotebookNode:
    """Without the values of an earlier run, which would silently outlive it."""
    injected = _tagged(nb, INJECTED)
    nb.cells = [cell for cell in nb.cells if not any(cell is other for other in injected)]
    return nb


@contextmanager
def _own_kernel() -> Iterator[None]:
    """Let ``python3`` be this interpreter's kernel, whatever kernels the machine has installed."""
    saved = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--log-level=CRITICAL"]  # its own log; what a cell writes is kept
        write_kernel_spec(Path(folder) / "kernels" / "python3", extra_arguments=quiet)
        os.environ["JUPYTER_PATH"] = os.pathsep.join(
            filter(None, [folder, saved.get("JUPYTER_PATH")])
        )
        os.environ.pop("MPLBACKEND", None)  # figures belong into the notebook
        os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # or debugpy writes to stderr
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(saved)


def _failure(path: Path, error: PapermillExecutionError) -> str:
    first = next((line for line in error.source.splitlines() if line.strip()), "").strip()
    where = f"cell {error.cell_index}" + (f" ({first[:40]!r})" if first else "")
    return f"{display_path(path)}: {where}: {error.ename}: {_one_line(error.evalue)}"


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else ""


def _name_cells(nb: NotebookNode) -> None:
    """Give each cell an id: its own where it has one, the injected cell always the same."""
    for index, cell in enumerate(nb.cells):
        injected = INJECTED in cell.metadata.get("tags", [])
        cell["id"] = INJECTED if injected else cell.get("id", f"cell-{index}")


def _number_cells(nb: NotebookNode) -> None:
    """Count the cells that have run from 1, as a fresh kernel would."""
    ran = (c for c in nb.cells if c.cell_type == "code" and c.execution_count is not None)
    count = 0
    for cell in ran:
        if cell.source.strip():
            count += 1
        cell.execution_count = count if cell.source.strip() else None
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count


def _without_progress(cell: NotebookNode) -> list[NotebookNode]:
    kept = PROGRESS not in cell.metadata.get("tags", [])
    return [output for output in cell.outputs if kept or output.get("name") != "stderr"]


def _merged_streams(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Join what one stream said in several messages, and keep what `\\r` left of each line."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            text = output.text.replace("\r\n", "\n")
            output.text = re.sub(r"[^\n]*\r(?=[^\n\r])", "", text).replace("\r", "")
    return merged


def _canonical_output(output: NotebookNode) -> None:
    if output.output_type == "stream":
        output.text = _without_addresses(output.text)
    for kind, content in output.get("data", {}).items():
        if kind == "text/plain":
            output.data[kind] = _without_addresses(content)
        if kind == "image/svg+xml":
            output.data[kind] = re.sub(r"<dc:date>.*?</dc:date>", "<dc:date></dc:date>", content)


def _without_addresses(text: str) -> str:
    return re.sub(r"\b0x[0-9a-f]{8,16}\b", "0x0", text)


MODEL_ID = re.compile(r"[0-9a-f]{32}")


def _canonical_widgets(nb: NotebookNode) -> NotebookNode:
    """Name widget models by their place: first those on display, in order, then by content."""
    state = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    if not state:
        return nb
    place = _places(nb, state)
    nb.metadata["widgets"][WIDGET_STATE]["state"] = {name: state[name] for name in place}
    text = MODEL_ID.sub(
        lambda found: f"{place[found.group()]:032x}" if found.group() in place else found.group(),
        json.dumps(nb),
    )
    return cast(NotebookNode, nbformat.from_dict(json.loads(text)))


def _places(nb: NotebookNode, state: Mapping[str, Any]) -> dict[str, int]:
    text = {name: json.dumps(model, sort_keys=True) for name, model in state.items()}
    place: dict[str, int] = {}

    def visit(name: str) -> None:
        if name in text and name not in place:
            place[name] = len(place)
            for child in MODEL_ID.findall(text[name]):
                visit(child)

    for cell in nb.cells:
        for output in cell.get("outputs", []):
            visit(output.get("data", {}).get(WIDGET_VIEW, {}).get("model_id", ""))

    def content(name: str) -> str:
        return MODEL_ID.sub(lambda found: f"#{place.get(found.group(), '')}", text[name])

    for name in sorted(set(text) - set(place), key=content):
        visit(name)
    return place


def resolve_from_root(name: str) -> str:
    """Resolve a path of a lab's parameters from the project's root; leave what is no path.

    Labs are executed in their own folder, and whoever names a file to them stands in the root.
    """
    there = PROJECT / name
    return str(there) if name and there.exists() else name
