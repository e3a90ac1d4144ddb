"""What a codec file holds, read without the model that it belongs to."""

from __future__ import annotations

import argparse
import json
from typing import Any

from safetensors import safe_open

from signlattice.cli.show import facts, plain, size, span, table
from signlattice.io import display_path
from signlattice.quantizers import codec as codec_file
from signlattice.quantizers.base import StoredQuantizer
from signlattice.quantizers.codec import KeyCodec


def inspect(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """``signlattice inspect``: a document, and the lines that say the same.

    Raises ``IntegrityError`` as `KeyCodec.load` does.
    """
    codec = KeyCodec.load(options.codec)
    with safe_open(options.codec, framework="pt") as file:
        header = json.loads(file.metadata()["signlattice"])
    known = codec.calibration
    n_bytes = options.codec.stat().st_size
    rows = [
        layer_row(index, code, () if known is None else known.beta[index])
        for index, code in codec.layers.items()
    ]
    document = {
        "file": str(options.codec),
        "bytes": n_bytes,
        "schema": header["schema"],
        "bits": header.get("bits", 32),
        "model_hash": codec.model_hash,
        "calibration_hash": known and known.text,
        "n_keys": known and known.n_keys,
        "noise_null": known and known.noise_null,
        "provenance": codec.provenance,
        "version": codec.provenance.get("signlattice"),
        "layers": rows,
    }
    pairs = [
        ("file", f"{display_path(options.codec)}, {size(n_bytes)}"),
        ("schema", f"{document['schema']}, {document['bits']} bits to a number"),
        ("model hash", codec.model_hash),
    ]
    if known is not None:
        inside, outside = known.noise_null
        pairs += [
            ("text hash", known.text),
            ("keys", f"{known.n_keys} of a head"),
            ("null", f"β of noise: {outside:.3f} held out, {inside:.3f} in sample"),
        ]
    pairs += sorted(codec.provenance.items())
    shown_rows = [
        row
        | {
            "temperature": row["temperature"] and span(row["temperature"]),
            "beta": " ".join(f"{value:.3f}" for value in row["beta"]) or None,
        }
        for row in rows
    ]
    columns = {
        "layer": ("layer", ""),
        "heads": ("heads", ""),
        "head_dim": ("size", ""),
        "code": ("code", ""),
        "centering": ("centering", ""),
        "scale": ("scale", ""),
        "temperature": ("temperature", ""),
        "beta": ("β of each head, held out", ""),
    }
    return plain(document), [*facts(pairs), "", *table(shown_rows, columns)]


def resave(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """``signlattice resave``: write a codec of an earlier schema anew.

    Raises ``IntegrityError`` as `quantizers.codec.resave` does.
    """
    output = options.output or options.codec
    codec = codec_file.resave(options.codec, output)
    document = {"file": str(output), "layers": sorted(codec.layers), "schema": codec_file.SCHEMA}
    return document, [f"{display_path(output)} written, {len(codec.layers)} layers"]


def layer_row(index: int, code: StoredQuantizer, beta: tuple[float, ...]) -> dict[str, Any]:
    """Describe what a codec does to one layer."""
    settings, temperature = code.settings(), getattr(code, "temperature", None)
    return {
        "layer": index,
        "heads": code.n_heads,
        "head_dim": code.head_dim,
        "code": code.name,
        "centering": settings.get("centering"),
        "scale": settings.get("scale_rule"),
        "temperature": None if temperature is None else temperature.tolist(),
        "beta": list(beta),
    }
