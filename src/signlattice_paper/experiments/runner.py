"""How every lab runs: its cases are measured one by one, and an interrupted run goes on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tqdm import tqdm

from signlattice import __version__
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.io import Progress, Scratch, no_progress
from signlattice.models.loading import LoadedModel
from signlattice_paper.records import Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Case = TypeVar("Case", bound=Hashable)
Tables = Mapping[str, Sequence[Row]]
"""Rows by the name of their table, as a record holds them."""


@dataclass(frozen=True)
class TableCase:
    """A case of a lab whose tables differ in kind: the lab has a method for each of them.

    ``table`` names the method, ``arguments`` is what it is called with.
    """

    table: str
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.table} {', '.join(map(str, self.arguments))}"


class ProgressBar(tqdm):
    """A bar that work advances by calling it with a phrase: a `Progress`.

    ``total`` is how many parts the work has, None if that is not known.
    """

    def __init__(self, name: str, total: int | None = None) -> None:
        super().__init__(desc=name, total=total, mininterval=10)

    def __call__(self, part: str) -> None:
        """Advance the bar by one part."""
        self.update()


class Lab(ABC, Generic[Config, Case]):
    """Measurements of a model on a text: `cases`, how to `measure` one, and what to `summarise`.

    ``scratch`` is the folder for what an interrupted run leaves. Its results are found again by a
    run of the same weights, text, version and configuration, and by no other.
    """

    def __init__(self, loaded: LoadedModel, text: Text, config: Config, scratch: Path) -> None:
        self.loaded, self.text, self.config = loaded, text, config
        self.scratch = Scratch.of(
            scratch,
            loaded.weights_hash,
            loaded.context,
            text.fingerprint,
            __version__,
            asdict(config),
        )

    @abstractmethod
    def cases(self) -> Sequence[Case]:
        """List what is measured, in the order of the rows; ``str`` names a case."""

    @abstractmethod
    def measure(self, case: Case) -> Tables:
        """Measure a case: its rows, by the table that they belong to."""

    def summarise(self, tables: Tables) -> Tables:
        """Complete the tables of all cases by what is of no single case."""
        return tables

    def measured(self, case: Case) -> Tables:
        """Load what `measure` gave in an earlier run, or measure the case now."""
        return self.scratch.row(f"case: {case}", lambda: dict(self.measure(case)))

    def run(self, progress: Progress = no_progress) -> Tables:
        """Measure all cases that no earlier run has measured; return the tables of all.

        ``progress`` is called once for each of the `cases`. Raises ``InputError`` as the lab does.
        """
        cases = self.cases()
        if len({str(case) for case in cases}) < len(cases):
            raise InputError(f"{len(cases)} cases, of which some are equal: name each of them once")
        tables: dict[str, list[Row]] = {}
        for case in cases:
            for table, rows in self.measured(case).items():
                tables.setdefault(table, []).extend(rows)
            progress(str(case))
        return self.summarise(tables)
