"""Calls of every public name with one argument that is of no use: each is refused in a line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

import signlattice
from signlattice import Centering, KeyCodec, LearnConfig, LoadedModel, read_text
from signlattice.models.loading import MODELS

BAD: tuple[Any, ...] = (
    None,
    "nonsense",
    b"x",
    -3,
    2.5,
    float("nan"),
    True,
    [],
    {},
    (1, 2),
    object(),
    torch.zeros(0),
    torch.ones(3, 3).int(),
)

EXEMPT = {"InputError", "IntegrityError", "LoadedModel", "__version__"}
"""What is no call, or made by `load_model` alone."""


def good(loaded: LoadedModel) -> dict[str, dict[str, Any]]:
    """Arguments that each public name takes, without those that may be left out."""
    codec = KeyCodec.load(MODELS / "olmoe-mini" / "lattice.safetensors")
    text = read_text("corpus")
    keys, quick = torch.randn(1, 64, 16), LearnConfig(steps=2, warm_steps=2, polish_steps=2)
    return {
        "CacheConfig": {},
        "CalibrationConfig": {},
        "Centering": {"method": "none"},
        "Judge": {"loaded": loaded, "documents": text.evaluation, "others": text.calibration},
        "KeyCodec": {"layers": codec.layers, "model_hash": codec.model_hash},
        "LearnConfig": {},
        "QualityConfig": {},
        "SignKeyCache": {"model": loaded, "codec": codec},
        "SignQuantizer": {"basis": torch.eye(16)[None], "centering": Centering("none")},
        "beta": {"y": keys},
        "capture": {"model": loaded.model},
        "cosine": {"y": keys},
        "elliptical_ceiling": {"eigenvalues": torch.ones(4)},
        "haar_beta": {"d": 8},
        "learn_codec": {"loaded": loaded, "text": text},
        "learn_rotation": {"keys": keys[0], "config": quick},
        "learn_rotations": {"keys": keys, "config": quick},
        "load_full": {"name": "olmoe-mini"},
        "load_model": {"name": "olmoe-mini"},
        "measure_codec": {"loaded": loaded, "codec": codec, "pieces": []},
        "moment_ratio": {"y": keys},
        "read_text": {"name": "corpus"},
    }


def calls(loaded: LoadedModel, name: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of one public name, with a word for each."""
    function, arguments = getattr(signlattice, name), good(loaded)[name]
    for parameter, known in inspect.signature(function).parameters.items():
        for value in BAD:
            if value is None and known.default is None:
                continue  # it may be left out

            def call(changed: dict[str, Any] = arguments | {parameter: value}) -> None:
                made = function(**changed)
                if name == "capture":
                    with made:
                        pass

            yield f"{name}({parameter}={type(value).__name__})", call
