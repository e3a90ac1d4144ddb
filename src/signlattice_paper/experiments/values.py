"""What values need: bits, rotation, centering and scale rule of V, with keys exact and at one bit.

Values are summed, not compared, so neither a static mean nor a rotation costs anything: weights
that sum to one carry the mean to a bias of the output projection, and the rotation R_V goes into
W_V and, transposed, into W_O. Here both are applied where values are read, which comes to the same.

The learned R_V maximises β of the centred values, as for keys (`learn`): the mean cosine of a value
to its signs, in which every value counts alike, whatever its norm and the weight it is given. It is
the best rotation for one bit in that sense alone; no error of more bits, of attention's output, or
of the model has a part in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor

from signlattice.calibration import CalibrationConfig
from signlattice.errors import InputError
from signlattice.io import Scratch
from signlattice.models.hooks import attention_layers
from signlattice.models.quantized_attention import Codes, quantized_attention
from signlattice.quantizers.centering import CENTERING_METHODS, Centering
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.quantizers.scales import SCALE_RULES
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.factory import rotate_heads
from signlattice.rotations.learned import learn_matrices
from signlattice_paper.experiments.comparison import Comparison, ComparisonConfig, shipped_lattice
from signlattice_paper.experiments.runner import Lab, TableCase, Tables
from signlattice_paper.records import Row

ROTATIONS = ("identity", "srht", "learned")
COMPARED_RULES = ("mse", "unbiased")
"""Scale rules of what is measured under two of them: least error, and a slope of one."""
WHOLE = 16.0
"""Bits to a coordinate of what is not coded."""


@dataclass(frozen=True)
class ValuesConfig:
    """What is crossed, and on how much text.

    Attributes:
        text: to calibrate and evaluate on, as `texts.read_text` takes it.
        bits, rotations, centerings, rules: of values, all crossed.
        rules_of_eight: the rules at eight bits, where their scales are nearly the same: gaps of
            olmoe-mini differed by less than a tenth of a per cent of perplexity.
        pairs: unequal bits of (keys, values) for both sides coded alike.
        layer_bits: widths at which one layer alone has coded values.
        head_bits: widths at which the output of each head is looked at.
        comparison: on how much text codes are fitted and compared.
        calibrate: how the lattice of the keys is learned where the model has none beside it.

    Raises:
        InputError: on a width outside 1 to 8, a name that there is not, or nothing to cross.
    """

    text: str = "corpus"
    bits: tuple[int, ...] = (1, 2, 3, 4, 8)
    rotations: tuple[str, ...] = ROTATIONS
    centerings: tuple[str, ...] = CENTERING_METHODS
    rules: tuple[str, ...] = SCALE_RULES
    rules_of_eight: tuple[str, ...] = ("mse",)
    pairs: tuple[tuple[int, int], ...] = (
        (1, 2),
        (2, 1),
        (1, 3),
        (3, 1),
        (1, 4),
        (4, 1),
        (2, 4),
        (4, 2),
    )
    layer_bits: tuple[int, ...] = (1, 2)
    head_bits: tuple[int, ...] = (1, 2, 4)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        for name, known in (
            ("rotations", ROTATIONS),
            ("centerings", CENTERING_METHODS),
            ("rules", SCALE_RULES),
            ("rules_of_eight", SCALE_RULES),
        ):
            given = getattr(self, name)
            if not given or set(given) - set(known):
                raise InputError(f"{name}={given}: choose some of {', '.join(known)}")
        for name in ("bits", "layer_bits", "head_bits"):
            _check_widths(name, getattr(self, name))
        for pair in self.pairs:
            _check_widths("pairs", pair)

    def rules_at(self, bits: int) -> tuple[str, ...]:
        """List the rules that are measured at a width."""
        return self.rules_of_eight if bits == 8 else self.rules


@dataclass(frozen=True)
class LevelSpec:
    """A `LevelQuantizer` by its names, the same in every layer."""

    bits: int
    rotation: str = "srht"
    centering: str = "token_mean"
    rule: str = "mse"

    def __str__(self) -> str:
        return " ".join(map(str, astuple(self)))


@dataclass(frozen=True)
class SideCase:
    """Bits of levels of keys ``k`` and of values ``v``, None for exact, under one rule for both.

    ``code`` is that of the keys: "levels", the same as of the values, or "lattice", which has one
    bit and a rule of its own.
    """

    code: str
    rule: str
    k: int | None
    v: int | None

    @property
    def side(self) -> str:
        """Name the side that is coded: "keys", "values" or "both"."""
        return "keys" if self.v is None else "values" if self.k is None else "both"


def value_codes(config: ValuesConfig) -> list[LevelSpec]:
    """List all codes of values that are crossed."""
    return [
        LevelSpec(bits, rotation, centering, rule)
        for bits in config.bits
        for rotation in config.rotations
        for centering in config.centerings
        for rule in config.rules_at(bits)
    ]


def side_cases(config: ValuesConfig) -> list[SideCase]:
    """List keys alone, values alone, both at equal bits, unequal pairs, and the lattice."""
    found = []
    for rule in COMPARED_RULES:
        for bits in config.bits:
            sides = ((bits, None), (None, bits), (bits, bits))
            found += [SideCase("levels", rule, *side) for side in sides]
        found += [SideCase("levels", rule, *pair) for pair in config.pairs]
        found += [SideCase("lattice", rule, 1, bits) for bits in config.bits]
    found.append(SideCase("lattice", "unbiased", 1, None))
    return list(dict.fromkeys(found))


class ValuesLab(Lab[ValuesConfig, TableCase]):
    """Tables of what values lose, each by the method of its name, and one row of exact attention.

    Gaps are as in `Comparison.row`, output errors as in `comparison.head_errors`. Running raises
    ``InputError`` as `cache_quality.full_windows` does, and `calibrate.learn_codec` where the model
    has no lattice.
    """

    def cases(self) -> list[TableCase]:
        config, layers = self.config, self.comparison.layers
        sides = side_cases(config)
        arguments = {
            "rows": itertools.product(("exact", "one bit"), value_codes(config)),
            "sides": ((case,) for case in sides),
            "outputs": ((case.code, case.k, case.rule) for case in sides if case.side == "keys"),
            "layers": itertools.product(layers, config.layer_bits, COMPARED_RULES),
            "heads": itertools.product(config.head_bits, config.rotations, config.centerings),
            "added": itertools.product(config.bits, config.rotations),
        }
        return [TableCase(table, given) for table, each in arguments.items() for given in each]

    def measure(self, case: TableCase) -> Tables:
        return {case.table: list(getattr(self, case.table)(*case.arguments))}

    def summarise(self, tables: Tables) -> Tables:
        return {"exact": [self.comparison.exact_row()], **tables}

    def rows(self, k: str, code: LevelSpec) -> Iterator[Row]:
        """Measure a code of values beside exact keys or beside keys on their one-bit lattice.

        ``bits`` are those of the levels; ``key_bits`` and ``value_bits`` are of a coordinate, with
        scales and means of tokens counted.
        """
        row = self._row("lattice" if k == "one bit" else None, code)
        yield {"k": k, **asdict(code), "learned": code.rotation == "learned", **row}

    def added(self, bits: int, rotation: str) -> Iterator[Row]:
        """Measure what the best code of a width and rotation adds to one-bit keys.

        Its gap is over the model with one-bit keys and exact values, with an interval of its own.
        """
        codes = [c for c in value_codes(self.config) if (c.bits, c.rotation) == (bits, rotation)]
        rows = [row for code in codes for row in self.rows("one bit", code)]
        row = best(rows, bits, "one bit")
        spec = LevelSpec(bits, rotation, row["centering"], row["rule"])
        values = self._codes("values", spec)  # fitted on exact states
        with quantized_attention(
            self.loaded.model, self._lattice
        ):  # exact attention has coded keys
            losses = self._beside_one_bit.row(str(spec), values=values)
        yield asdict(spec) | {"value_bits": row["value_bits"]} | losses

    def sides(self, case: SideCase) -> Iterator[Row]:
        """Measure the same code on keys, on values, or on both."""
        keys = "lattice" if case.code == "lattice" else _plain(case.k, case.rule)
        row = self._row(keys, _plain(case.v, case.rule))
        yield {**asdict(case), "side": case.side, **row}

    def layers(self, layer: int, bits: int, rule: str) -> Iterator[Row]:
        """Measure values coded in one layer alone, after an SRHT and a static mean."""
        code = _plain(bits, rule)
        values = {layer: self._codes("values", code)[layer]}
        row = self.comparison.row(f"layer {layer}, {code}", values=values)
        yield {"layer": layer, "bits": bits, "rule": rule, **row}

    def outputs(self, code: str, bits: int, rule: str) -> Iterator[Row]:
        """Measure by layer the error of attention's output with keys or with values coded."""
        spec = _plain(bits, rule)
        keys = self._heads("lattice" if code == "lattice" else spec, None)
        values = self._heads(None, spec)
        for layer in dict.fromkeys(head["layer"] for head in keys):
            of_keys, of_values = (
                [head["output_error"] for head in side if head["layer"] == layer]
                for side in (keys, values)
            )
            yield {
                "code": code,
                "bits": bits,
                "rule": rule,
                "layer": layer,
                "keys": fmean(of_keys),
                "values": fmean(of_values),
            }

    def heads(self, bits: int, rotation: str, centering: str) -> Iterator[Row]:
        """Measure the error of the output of each head under two rules, keys exact.

        ``cosine`` of a held-out value to its code: at one bit β. ``effective_keys``: 1 / E Σ w².
        """
        specs = [LevelSpec(bits, rotation, centering, rule) for rule in COMPARED_RULES]
        cosines = self._cosines(specs[0])
        for least, unbiased in zip(*(self._heads(None, spec) for spec in specs)):
            layer, source, head = (least[name] for name in ("layer", "source", "head"))
            yield {
                "layer": layer,
                "source": source,
                "head": head,
                "bits": bits,
                "rotation": rotation,
                "centering": centering,
                "output_error_mse": least["output_error"],
                "output_error_unbiased": unbiased["output_error"],
                "cosine": cosines[source][head].item(),
                "effective_keys": self._effective_keys[layer][head].item(),
            }

    @cached_property
    def comparison(self) -> Comparison:
        return Comparison(self.loaded, self.text, self.config.comparison, self.scratch)

    @cached_property
    def _beside_one_bit(self) -> Comparison:
        """A comparison of values whose exact attention is computed with keys at one bit."""
        scratch = Scratch(self.scratch.folder / "beside one-bit keys")
        return Comparison(self.loaded, self.text, self.config.comparison, scratch)

    def _row(self, keys: LevelSpec | str | None, values: LevelSpec | None) -> Row:
        codes = self._codes("keys", keys), self._codes("values", values)
        width = {"key_bits": _width(codes[0]), "value_bits": _width(codes[1])}
        return width | self.comparison.row(_pair_name(keys, values), *codes)

    def _heads(self, keys: LevelSpec | str | None, values: LevelSpec | None) -> Sequence[Row]:
        name = f"heads: {_pair_name(keys, values)}"
        return self.scratch.row(name, self._compare_heads, keys, values)["heads"]

    def _compare_heads(self, keys: LevelSpec | str | None, values: LevelSpec | None) -> dict:
        codes = self._codes("keys", keys), self._codes("values", values)
        return {"heads": self.comparison.heads(*codes)}

    def _codes(self, side: str, spec: LevelSpec | str | None) -> Codes:
        """Fit a code by layer; ``spec`` None is no code, and "lattice" is that of the keys."""
        if spec is None:
            return {}
        if spec == "lattice":
            return self._lattice
        rotations = self._rotations(side, spec.rotation, spec.centering)
        return {
            layer: LevelQuantizer(
                Centering.fit(getattr(states, side), spec.centering),
                rotations[layer],
                spec.bits,
                spec.rule,
                spec.rotation == "learned",
            )
            for layer, states in self.comparison.fit.items()
        }

    @cached_property
    def _known_rotations(self) -> dict[tuple[str, str, str], dict[int, Tensor]]:
        return {}

    def _rotations(self, side: str, rotation: str, centering: str) -> dict[int, Tensor]:
        name = (side, rotation, centering)
        if name not in self._known_rotations:
            self._known_rotations[name] = {
                layer: self._rotation(layer, getattr(states, side), rotation, centering)
                for layer, states in self.comparison.fit.items()
            }
        return self._known_rotations[name]

    def _rotation(self, layer: int, vectors: Tensor, rotation: str, centering: str) -> Tensor:
        seed = self.config.comparison.seed
        if rotation != "learned":
            return rotate_heads(vectors, rotation, seed)
        centred, _ = Centering.fit(vectors, centering).split(vectors)
        name = f"R_V of layer {layer}, {centering}"
        return self.scratch.tensors(name, lambda: {0: learned_rotations(centred, seed)})[0]

    @cached_property
    def _lattice(self) -> Codes:
        """The one-bit keys: the codec beside the model, or one that is learned if there is none."""
        kept = self.scratch.file("lattice", ".safetensors")
        codec = shipped_lattice(self.loaded, self.text, self.config.calibrate, kept)
        return {layer: code for layer, code in codec.layers.items()}

    def _cosines(self, spec: LevelSpec) -> dict[int, Tensor]:
        """Mean cosine [H] of held-out centred values to their code, by layer."""
        found = {}
        for layer, code in self._codes("values", spec).items():
            values = torch.cat([states[layer].values for states in self.comparison.held_out], 1)
            centred, offset = code.centering.split(values)
            coded = code.reconstruct(values) - offset
            found[layer] = torch.cosine_similarity(centred, coded, dim=-1).mean(-1)
        return found

    @cached_property
    def _effective_keys(self) -> dict[int, Tensor]:
        """1 / E Σ w² of exact attention [H], by the layer that asks."""
        readers, squares = attention_layers(self.loaded.model), {}
        for states in self.comparison.held_out:
            for seen in states.values():
                for reader, queries in seen.queries.items():
                    grouped = queries.unflatten(0, (len(seen.keys), -1))
                    weights = readers[reader].log_weights(grouped @ seen.keys.unsqueeze(1).mT)
                    late = weights[:, :, self.config.comparison.first_query :].exp()
                    mean = late.square().sum(-1).mean((1, 2))
                    squares[reader] = squares.get(reader, 0) + mean / len(self.comparison.held_out)
        return {reader: 1 / mean for reader, mean in squares.items()}


def best(rows: Iterable[Row], bits: int, k: str, **wanted: str) -> Row:
    """Find the row of the smallest gap among those of a width.

    ``k`` is "exact" or "one bit"; ``wanted`` are other columns, such as a rotation. Raises
    ``InputError`` if there is none.
    """
    wanted |= {"bits": bits, "k": k}
    found = [row for row in rows if all(row[name] == wanted[name] for name in wanted)]
    if not found:
        raise InputError(f"no row has {wanted}")
    return min(found, key=lambda row: row["gap"])


def needed_bits(rows: Iterable[Row], percent: float) -> int | None:
    """Find the fewest bits of values at which some code surely loses no more than ``percent``.

    Surely: the upper end of the interval of its gap. None where no code does. Of the table "rows"
    give those of one ``k``; those of "added" say what values lose beyond one-bit keys.
    """
    return min((row["bits"] for row in rows if row["gap_high"] <= percent), default=None)


def learned_rotations(centred: Tensor, seed: int) -> Tensor:
    """Learn R_V of centred values [H, N, D]: the rotations [H, D, D] of the largest β by head.

    Raises ``InputError`` as `learn.learn_rotations` does.
    """
    return learn_matrices(centred, LearnConfig(seed=seed))


def _plain(bits: int | None, rule: str) -> LevelSpec | None:
    """After an SRHT and a static mean: what sides and layers are compared with."""
    return None if bits is None else LevelSpec(bits, rule=rule)


def _pair_name(keys: LevelSpec | str | None, values: LevelSpec | None) -> str:
    return " | ".join("exact" if spec is None else str(spec) for spec in (keys, values))


def _width(codes: Codes) -> float:
    """Bits to a coordinate, mean over layers; of no code, those of what is whole."""
    return fmean(code.bits for code in codes.values()) if codes else WHOLE


def _check_widths(name: str, widths: Sequence[int]) -> None:
    if not widths or not all(1 <= bits <= 8 for bits in widths):
        raise InputError(f"{name}={tuple(widths)}: use widths of 1 to 8 bits")
