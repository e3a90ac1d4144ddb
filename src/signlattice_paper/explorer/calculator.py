"""A calculator of what a KV cache weighs: any shape, any format, any length.

The arithmetic runs in the reader's browser, so that it works in the built page; it is that of
``memory``, and the tests compare the two. In Jupyter ``shape`` and ``format`` say what is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from signlattice.errors import InputError
from signlattice.memory import NAMED_FORMATS, SIGN_KEYS, CacheFormat, KVShape

_HERE = Path(__file__).parent
_GIB = 2**30

Setting = float | int | None


@dataclass(frozen=True)
class Field:
    """One number that a reader may set.

    ``of`` says what it belongs to: "shape", "format" or "load". ``optional`` are the words for a
    field that is left empty. ``range`` gives it a slider: from, to and step, of the base-2
    logarithm if ``logarithmic``.
    """

    name: str
    label: str
    unit: str
    group: str
    of: str
    least: float = 0
    most: float = 4096
    whole: bool = True
    optional: str | None = None
    range: tuple[float, float, float] | None = None
    logarithmic: bool = False


FIELDS: tuple[Field, ...] = (
    Field("n_layers", "layers", "that hold a cache", "model", "shape", 1, 10_000),
    Field("n_kv_heads", "KV heads", "per layer", "model", "shape", 1, 10_000),
    Field("head_dim", "head size", "coordinates of a key", "model", "shape", 1, 65_536),
    Field("weights", "weights", "GiB", "model", "shape", 0.0001, 1_000_000, whole=False),
    Field(
        "seq_len",
        "length",
        "tokens of a sequence",
        "load",
        "load",
        1,
        2**30,
        range=(5, 20, 0.125),
        logarithmic=True,
    ),
    Field("batch", "batch", "sequences", "load", "load", 1, 1_000_000),
    Field(
        "key_bits",
        "key bits",
        "per coordinate",
        "format",
        "format",
        0.01,
        64,
        whole=False,
        range=(1, 16, 0.5),
    ),
    Field(
        "value_bits",
        "value bits",
        "per coordinate",
        "format",
        "format",
        0.01,
        64,
        whole=False,
        range=(1, 16, 0.5),
    ),
    Field("key_scale_bits", "scale of a key", "bits per key", "format", "format"),
    Field("mean_bits", "mean of a key", "bits per key", "format", "format"),
    Field("value_scale_bits", "scale of values", "bits per group", "format", "format"),
    Field(
        "value_group",
        "group of values",
        "coordinates",
        "format",
        "format",
        1,
        65_536,
        optional="all",
    ),
    Field("window", "latest tokens", "kept in 16 bits", "format", "format", 0, 2**30),
    Field("sinks", "first tokens", "kept in 16 bits", "format", "format", 0, 2**30),
    Field("rotation_bits", "rotation", "bits per entry, 0 if from a seed", "rest", "format"),
    Field("static_mean_bits", "mean of a head", "bits per coordinate", "rest", "format"),
    Field("temperature_bits", "temperature", "bits per head", "rest", "format"),
    Field("word_bits", "padding", "bits that codes are padded to", "rest", "format", 1),
    Field(
        "value_head_dim",
        "value size",
        "coordinates of a value",
        "rest",
        "shape",
        1,
        65_536,
        optional="as keys",
    ),
    Field(
        "sliding_window",
        "sliding window",
        "tokens that layers keep",
        "rest",
        "shape",
        1,
        2**30,
        optional="all",
    ),
)

_GROUPS = (
    {"name": "model", "title": "Model"},
    {"name": "load", "title": "Load"},
    {"name": "format", "title": "Cache format"},
    {"name": "rest", "title": "Tables and odd shapes", "more": "more to set"},
)

SHAPES: Mapping[str, tuple[KVShape, float]] = {
    "OLMoE-1B-7B": (KVShape(n_layers=16, n_kv_heads=16, head_dim=128), 2 * 6.919e9),
    "Mixtral-8x7B": (KVShape(n_layers=32, n_kv_heads=8, head_dim=128), 2 * 46.7e9),
    "Qwen3-30B-A3B": (KVShape(n_layers=48, n_kv_heads=4, head_dim=128), 2 * 30.5e9),
    "Llama-3.1-8B": (KVShape(n_layers=32, n_kv_heads=8, head_dim=128), 2 * 8.03e9),
}
"""Models by their published configurations: the shape, and bytes of the weights in 16 bits."""


class Calculator(anywidget.AnyWidget):
    """The calculator, set to a model, a format, a length and a batch.

    Args:
        model: a name of ``SHAPES``.
        fmt: a format; it and those of ``memory.NAMED_FORMATS`` can be chosen by name.
        seq_len: tokens per sequence.
        batch: sequences.

    Raises:
        InputError: on an unknown model.
    """

    _esm = (_HERE / "calculator.js").read_text(encoding="utf-8")
    _css = (_HERE / "calculator.css").read_text(encoding="utf-8")

    settings = traitlets.Dict().tag(sync=True)
    fields = traitlets.List().tag(sync=True)
    groups = traitlets.List().tag(sync=True)
    shapes = traitlets.Dict().tag(sync=True)
    formats = traitlets.Dict().tag(sync=True)
    shape_name = traitlets.Unicode().tag(sync=True)
    format_name = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        model: str = "OLMoE-1B-7B",
        fmt: CacheFormat = SIGN_KEYS,
        *,
        seq_len: int = 8192,
        batch: int = 1,
    ) -> None:
        if model not in SHAPES:
            raise InputError(f"unknown model {model!r}: choose one of {', '.join(SHAPES)}")
        formats = {each.name: each for each in (fmt, *NAMED_FORMATS)}
        super().__init__(
            settings=settings(*SHAPES[model], fmt, seq_len, batch),
            fields=[asdict(field) for field in FIELDS],
            groups=[dict(group) for group in _GROUPS],
            shapes={name: shape_settings(*shape) for name, shape in SHAPES.items()},
            formats={name: format_settings(each) for name, each in formats.items()},
            shape_name=model,
            format_name=fmt.name,
        )

    @property
    def shape(self) -> KVShape:
        """The shape that is set."""
        return KVShape(**_of(KVShape, self.settings))

    @property
    def format(self) -> CacheFormat:
        """The format that is set."""
        return CacheFormat(name="as set", **_of(CacheFormat, self.settings))


def settings(
    shape: KVShape, weight_bytes: float, fmt: CacheFormat, seq_len: int, batch: int
) -> dict[str, Setting]:
    """All numbers of the calculator by name; sizes of weights are in GiB."""
    load = {"seq_len": seq_len, "batch": batch}
    return shape_settings(shape, weight_bytes) | format_settings(fmt) | load


def shape_settings(shape: KVShape, weight_bytes: float) -> dict[str, Setting]:
    """Return the numbers of a model."""
    return asdict(shape) | {"weights": round(weight_bytes / _GIB, 3)}


def format_settings(fmt: CacheFormat) -> dict[str, Setting]:
    """Return the numbers of a format."""
    return {name: value for name, value in asdict(fmt).items() if name != "name"}


def _of(kind: type, numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: numbers[field.name] for field in fields(kind) if field.name in numbers}
