"""Notebooks: a run in place that is repeatable to the byte, and fails without leaving a trace."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.translators import PythonTranslator

from signlattice.errors import InputError, IntegrityError
from signlattice_paper import notebooks
from signlattice_paper.notebooks import NotebookError, normalise, to_text

SLIDER = """
import ipywidgets as widgets
from IPython.display import display
slider = widgets.IntSlider(description="frame", max=1)
stack = widgets.Stack([widgets.HTML("a"), widgets.HTML("b")])
link = widgets.jslink((slider, "value"), (stack, "selected_index"))
display(widgets.VBox([slider, stack]))
"""


def write(path: Path, *sources: str, parameters: str = "") -> Path:
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
    nb = new_notebook(cells=[new_markdown_cell("# Title"), *cells, *map(new_code_cell, sources)])
    nbformat.write(nb, path)
    return path


def outputs(path: Path) -> list[str]:
    cells = [cell for cell in notebooks.read(path).cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


def test_run_a_second_time_changes_no_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", SLIDER, "print(object())", "import time; time.time_ns()")
    nb = notebooks.read(path)
    nb.cells[-1].source = "print('x', flush=True); print('y')"
    nbformat.write(nb, path)
    notebooks.run(path, progress=False)
    first = path.read_bytes()
    assert notebooks.problems(path) == ()
    state = notebooks.read(path).metadata.widgets[notebooks.WIDGET_STATE].state
    assert f"{0:032x}" in state and len(state) > 5
    notebooks.run(path, progress=False)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


def test_run_uses_this_interpreter_whatever_kernel_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    foreign = {"argv": ["/bin/false"], "display_name": "foreign", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(foreign))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    source = "import os, sys\nprint(sys.executable, os.getcwd(), os.environ['MPLBACKEND'][-6:])"
    path = write(tmp_path / "a.ipynb", source)
    notebooks.run(path, progress=False)
    assert outputs(path) == [f"{sys.executable} {tmp_path.resolve()} inline\n"]


def test_run_with_parameters_replaces_defaults_for_that_run_alone(tmp_path: Path) -> None:
    defaults = "model = 'a'\nsteps: int = 3"
    path = write(tmp_path / "a.ipynb", "print(model, steps)", parameters=defaults)
    assert notebooks.parameters(notebooks.read(path)) == {"model": "a", "steps": 3}
    notebooks.run(path, {"model": "b"}, progress=False)
    assert outputs(path)[-1] == "b 3\n"
    assert "injected-parameters" in [cell.id for cell in notebooks.read(path).cells]
    notebooks.run(path, {"model": "a"}, progress=False)
    assert outputs(path) == ["", "a 3\n"], "a default leaves no cell, and the old one is gone"


def test_run_may_go_elsewhere_and_leave_the_notebook(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", "print(model)", parameters="model = 'a'")
    before = path.read_bytes()
    notebooks.run(path, {"model": "b"}, out=tmp_path / "out" / "b", progress=False)
    assert path.read_bytes() == before
    assert outputs(tmp_path / "out" / "b" / "a.ipynb")[-1] == "b\n"


def test_run_says_in_one_line_which_cell_failed_and_leaves_the_file(tmp_path: Path) -> None:
    source = "print('before')\nraise ValueError('first line\\nsecond line')"
    path = write(tmp_path / "a.ipynb", "x = 1", source)
    before = path.read_bytes()
    with pytest.raises(NotebookError) as caught:
        notebooks.run(path, progress=False)
    message = str(caught.value)
    assert message.endswith("""cell 2 ("print('before')"): ValueError: first line""")
    assert "\n" not in message and str(path) in message
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


def test_run_tells_a_dead_kernel_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", "import os; os._exit(7)")
    before = path.read_bytes()
    with pytest.raises(NotebookError, match="the kernel stopped"):
        notebooks.run(path, progress=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "a"}, "has no parameter 'modle'; it has model, steps, lr, on"),
        ({"steps": "many"}, "parameter steps='many' must be of type int, as its default 3"),
        ({"steps": 2.5}, "steps=2.5 must be of type int"),
        ({"steps": True}, "steps=True must be of type int"),
        ({"on": 1}, "on=1 must be of type bool"),
    ],
)
def test_run_all_refuses_wrong_parameters_before_anything_runs(
    values: dict[str, object], message: str, tmp_path: Path
) -> None:
    defaults = "model = 'a'\nsteps = 3\nlr = 0.1\non = True"
    path = write(tmp_path / "a.ipynb", "1 / 0", parameters=defaults)
    with pytest.raises(InputError) as caught:
        notebooks.run_all([path], values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_run_all_reads_every_notebook_before_anything_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", "1 / 0")
    with pytest.raises(InputError, match="cannot read the notebook missing.ipynb"):
        notebooks.run_all([path, Path("missing.ipynb")])


def test_changed_parameters_take_whole_numbers_for_floats_and_anything_for_none(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.ipynb", parameters="lr = 0.1\nseed = None")
    nb = notebooks.read(path)
    values = {"lr": 1, "seed": "any"}
    assert notebooks._changed_parameters(nb, values, path) == values


def test_run_says_that_a_notebook_has_no_parameters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", "x = 1")
    with pytest.raises(InputError, match="no cell is tagged 'parameters'"):
        notebooks.run(path, {"x": 2}, progress=False)


def test_read_refuses_what_is_no_notebook(tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_text("{")
    with pytest.raises(IntegrityError, match="a.ipynb is not a notebook"):
        notebooks.read(tmp_path / "a.ipynb")


def executed(*cells: NotebookNode) -> NotebookNode:
    return new_notebook(cells=list(cells))


def ran(source: str, *made: NotebookNode, count: int | None = 7, **metadata) -> NotebookNode:
    return new_code_cell(source, execution_count=count, outputs=list(made), metadata=metadata)


def stream(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        (["a", "b\n", "c"], "ab\nc"),
        (["10 %\r", "20 %\rdone\n"], "done\n"),
        (["line\r\n", "next\r\n"], "line\nnext\n"),
        (["at 0x7f36a3b28280\n"], "at 0x0\n"),
    ],
)
def test_normalise_gives_streams_one_form(chunks: list[str], text: str) -> None:
    nb = normalise(executed(ran("x", *map(stream, chunks))))
    assert [output.text for output in nb.cells[0].outputs] == [text]


def test_normalise_keeps_streams_of_two_names_apart() -> None:
    nb = normalise(executed(ran("x", stream("a"), stream("b", "stderr"), stream("c"))))
    assert [output.text for output in nb.cells[0].outputs] == ["a", "b", "c"]


def test_normalise_keeps_no_progress_bars() -> None:
    bar = ran("x", stream("a"), stream("50 %", "stderr"), stream("b"), tags=["progress"])
    nb = normalise(executed(bar))
    assert [output.text for output in nb.cells[0].outputs] == ["ab"]


def test_normalise_removes_noise_and_counts_from_one() -> None:
    value = new_output(
        "execute_result", data={"text/plain": "<f at 0x7f36a3b28280>"}, execution_count=9
    )
    svg = new_output("display_data", data={"image/svg+xml": "<dc:date>2026-01-01</dc:date>"})
    noise = {"papermill": {"duration": 1}, "execution": {}, "collapsed": False, "tags": []}
    nb = executed(ran("a", value, count=9, **noise), ran(" ", count=None), ran("b", svg, count=12))
    nb.metadata.update(papermill={}, kernelspec={"name": "other"}, title="kept")
    done = normalise(nb)
    assert [cell.execution_count for cell in done.cells] == [1, None, 2]
    assert done.cells[0].outputs[0].execution_count == 1
    assert done.cells[0].outputs[0].data["text/plain"] == "<f at 0x0>"
    assert done.cells[2].outputs[0].data["image/svg+xml"] == "<dc:date></dc:date>"
    assert dict(done.cells[0].metadata) == {}
    assert done.metadata.kernelspec["name"] == "python3" and done.metadata.title == "kept"
    assert "papermill" not in done.metadata
    assert nb.cells[0].execution_count == 9, "the argument is left alone"


@given(st.permutations(["a" * 32, "b" * 32, "c" * 32, "d" * 32]))
def test_normalise_gives_widgets_one_form_whatever_their_ids(names: list[str]) -> None:
    top, child, first, second = names
    state = {
        second: {"model_name": "Other", "state": {"text": "second"}},
        child: {"model_name": "Slider", "state": {"value": 1}},
        top: {"model_name": "Box", "state": {"children": [f"IPY_MODEL_{child}"]}},
        first: {"model_name": "Link", "state": {"source": [f"IPY_MODEL_{child}", "value"]}},
    }
    view = new_output("display_data", data={notebooks.WIDGET_VIEW: {"model_id": top}})
    cell = ran("x", view)
    cell["id"] = "cell"
    nb = executed(cell)
    nb.metadata["widgets"] = {notebooks.WIDGET_STATE: {"state": state}}
    done = normalise(nb)
    place = [f"{i:032x}" for i in range(4)]
    found = done.metadata["widgets"][notebooks.WIDGET_STATE]["state"]
    assert [found[name]["model_name"] for name in place] == ["Box", "Slider", "Link", "Other"]
    assert found[place[0]]["state"]["children"] == [f"IPY_MODEL_{place[1]}"]
    assert done.cells[0].outputs[0].data[notebooks.WIDGET_VIEW]["model_id"] == place[0]
    assert to_text(normalise(done)) == to_text(done)


def test_normalise_gives_every_cell_an_id_that_stays() -> None:
    cells = [ran("a"), ran("b"), ran("c", tags=["injected-parameters"])]
    cells[0]["id"] = "own"
    del cells[1]["id"]
    nb = nbformat.from_dict({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4})
    ids = [cell.id for cell in normalise(nb).cells]
    assert ids == ["own", "cell-1", "injected-parameters"]


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ([ran("a", count=None)], "not executed"),
        ([ran("a", count=2), ran("b", count=1)], "not executed"),
        (
            [ran("a", new_output("error", ename="E", evalue="bad\nworse"), count=1)],
            "cell 0 failed: E: bad",
        ),
        ([ran("a", stream("careful", "stderr"), count=1)], "cell 0 wrote to stderr: careful"),
        ([ran("a", count=1, papermill={})], "not normalised"),
    ],
)
def test_problems_are_told(cells: list[NotebookNode], told: str, tmp_path: Path) -> None:
    nb = executed(*cells)
    (tmp_path / "a.ipynb").write_text(to_text(nb), encoding="utf-8")
    assert any(told in line for line in notebooks.problems(tmp_path / "a.ipynb"))


def test_problems_name_code_that_was_edited_after_it_ran(tmp_path: Path) -> None:
    nb = executed(ran("a", count=1), new_markdown_cell("words"))
    nb.metadata["signlattice"] = {"executed": notebooks.fingerprint(nb)}
    path = tmp_path / "a.ipynb"
    nb.cells[1].source = "other words"
    path.write_text(to_text(normalise(nb)), encoding="utf-8")
    assert notebooks.problems(path) == ()
    nb.cells[0].source = "b"
    path.write_text(to_text(normalise(nb)), encoding="utf-8")
    (line,) = notebooks.problems(path)
    assert "edited after it ran: run it again" in line


def test_normalise_file_says_whether_it_changed_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    nb = executed(ran("a", count=5))
    nb.metadata["signlattice"] = {"executed": notebooks.fingerprint(nb)}
    nbformat.write(nb, path)
    assert notebooks.normalise_file(path)
    assert notebooks.problems(path) == ()
    assert not notebooks.normalise_file(path)


def test_run_all_records_how_long_each_notebook_takes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(notebooks, "environment_bytes", lambda: 2_500_000_000)
    paths = [write(tmp_path / f"{name}.ipynb", "print(1)") for name in ("one", "two")]
    record = notebooks.run_all(paths, times=True)
    rows = record.table("notebooks")
    assert [row["notebook"] for row in rows] == [str(path) for path in paths]
    assert all(0 < row["seconds"] <= record.seconds for row in rows)
    assert record.metric("environment_gigabytes").value == 2.5
    assert notebooks.run_all([]) is None


def test_environment_bytes_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert notebooks.environment_bytes(tmp_path) == 8


@pytest.mark.parametrize(
    "text",
    ["my model #2", "1234567", "1e3", "null", "{a: 1}", "yes", " x ", 'a"b\\', "a\nb", "é\0"],
)
def test_run_takes_a_text_verbatim(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", parameters="model = 'a'")
    changed = notebooks._changed_parameters(notebooks.read(path), {"model": text}, path)
    assert changed == {"model": text}
    code = PythonTranslator.codify(changed, "")
    assert ast.literal_eval(code.partition("model = ")[2]) == text


def test_run_reads_numbers_of_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", parameters="steps = 3\nlr = 0.1\non = False\nseed = None")
    given = {"steps": "4", "lr": "1", "on": "true", "seed": "7"}
    changed = notebooks._changed_parameters(notebooks.read(path), given, path)
    assert changed == {"steps": 4, "lr": 1, "on": True, "seed": 7}
