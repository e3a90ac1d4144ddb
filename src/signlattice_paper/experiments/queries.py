"""Queries of few bits: in the frame of the keys that they meet, or each head in one of its own.

A query is q̂ = α Rᵀ sign(R q). With R the rotation of a KV head, and keys signed in the same one, a
score is a count of equal bits. A query head may be turned by a rotation R_q of its own instead; the
score of two signs is then s_qᵀ (R_q R_kᵀ) s_k, with a matrix in between: no count of bits any more,
and as much arithmetic as a query that was never signed.

The mean of queries does not cancel as that of keys does: q = m + r makes a score m·k + r·k, and m·k
differs from key to key. It has to be kept: one number of 16 bits to a key for each query head that
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.models.quantized_attention import Codes, QueryCode
from signlattice.models.states import LayerStates
from signlattice.quantizers.basis import LatticeConfig, learn_basis
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.levels import LevelQuantizer, gaussian_levels
from signlattice.quantizers.scales import ScaleRule
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.factory import rotate_heads
from signlattice.rotations.learned import learn_matrices
from signlattice_paper.experiments.comparison import Comparison, ComparisonConfig
from signlattice_paper.experiments.runner import Lab, Tables
from signlattice_paper.records import Row

KEYS = ("full", "rotation", "lattice", "frame")
"""How keys are read: as they are; as signs of a rotation learned on them, or of a lattice; or as
signs in the same frame as the queries."""

KV_FRAMES = ("srht", "keys", "queries", "both")
"""Rotations of a KV head: random, or learned on its keys, on all queries that read it, or on as
many of these as of those."""

FRAMES = (*KV_FRAMES, "own")
"""What a query is turned by; ``own`` is learned on the queries of its head alone."""


@dataclass(frozen=True)
class QueriesConfig:
    """What is crossed.

    Attributes:
        text: to fit and evaluate on, as `texts.read_text` takes it.
        widths: bits of queries beside the sign.
        comparison: on how much text.

    Raises:
        InputError: on a width outside 2 to 8.
    """

    text: str = "corpus"
    widths: tuple[int, ...] = (2, 4, 8)
    comparison: ComparisonConfig = field(default_factory=lambda: ComparisonConfig(n_heads_on=4))

    def __post_init__(self) -> None:
        for width in self.widths:
            gaussian_levels(width)
            if width < 2:
                raise InputError(f"widths={self.widths}: use 2 to 8, the sign is there anyway")


@dataclass(frozen=True)
class Case:
    """Keys and queries to be measured.

    ``keys`` of `KEYS`; ``frame`` of `FRAMES`, "" for queries that stay whole. ``mean`` of each
    query head: "in" the code; taken off and "kept" whole, to meet the keys as they are read; or
    "dropped", which is not what attention asks for. ``main``: whether its heads have rows.
    """

    keys: str
    frame: str = ""
    levels: int = 1
    mean: str = "in"
    rule: ScaleRule = "unbiased"
    main: bool = field(default=False, compare=False, repr=False)

    @property
    def counted(self) -> bool:
        """Say whether a score is a count of equal bits: signs on both sides, in one frame.

        A mean that is kept adds a number of each key to it.
        """
        one_frame = self.keys == "frame" or (self.keys, self.frame) == ("rotation", "keys")
        return one_frame and self.levels == 1


def cases(config: QueriesConfig) -> list[Case]:
    """List all that is measured."""
    found = [Case("full", mean="dropped"), Case("full", "own", mean="dropped")]
    for keys in ("full", "rotation", "lattice"):
        if keys != "full":
            found.append(Case(keys, main=True))
        found += [
            Case(keys, frame, mean=mean, main=keys != "lattice" and mean == "in")
            for frame in FRAMES
            for mean in ("in", "kept")
        ]
        found += [Case(keys, "keys", width) for width in config.widths]
    found += [Case("frame", frame, main=True) for frame in KV_FRAMES if frame != "keys"]
    return found + [
        Case(keys, frame, rule=rule)
        for keys in ("full", "rotation")
        for frame in ("keys", "own")
        for rule in ("mse", "norm")
    ]


class QueriesLab(Lab[QueriesConfig, Case]):
    """Tables "exact", "means" (how much of the queries their mean is), "rows" and "heads".

    ``extra`` is what a row's gap has over that of whole queries with the same keys; ``mean_bits``
    what a kept mean adds to a coordinate of each key. Rotations are fitted on the calibration side
    of the text.

    Running raises ``InputError`` as `cache_quality.full_windows` does.
    """

    def cases(self) -> list[Case]:
        """List the cases that are measured."""
        return cases(self.config)

    def measure(self, case: Case) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        keys, queries = self.keys(case), self.queries(case)
        losses = self.comparison.row(str(case), keys, queries=queries)
        heads = self.comparison.heads(keys, queries=queries)
        described = self.described(case)
        means = {
            name: sum(head[name] for head in heads) / len(heads)
            for name in ("correlation", "attention_kl")
        }
        return {
            "rows": [described | losses | means],
            "heads": [described | head for head in heads] if case.main else [],
        }

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        whole = {"full": 0.0}  # the gap of whole queries, by how keys are read
        whole |= {r["k"]: r["gap"] for r in tables["rows"] if not r["frame"] and r["mean"] == "in"}
        return {
            "exact": [self.comparison.exact_row()],
            "means": mean_rows(self.comparison.fit),
            "rows": [
                row | {"extra": row["gap"] - whole[row["k"]] if row["k"] in whole else None}
                for row in tables["rows"]
            ],
            "heads": tables["heads"],
        }

    @cached_property
    def comparison(self) -> Comparison:
        """Compare codes on the model by its losses and heads."""
        return Comparison(self.loaded, self.text, self.config.comparison, self.scratch)

    def described(self, case: Case) -> Row:
        """Name a case by the columns that are known before anything is measured."""
        d = next(iter(self.comparison.layers.values())).head_dim
        states = next(iter(self.comparison.fit.values()))
        readers = sum(map(len, states.queries.values())) // len(states.keys)
        coded = "signed" if case.levels == 1 else "levels"
        return {
            "k": case.keys,
            "q": coded if case.frame else "full",
            "frame": case.frame,
            "levels": case.levels if case.frame else None,
            "mean": case.mean,
            "rule": case.rule if case.frame else "",
            "counted": case.counted,
            "q_bits": case.levels + 16 / d if case.frame else 16.0,
            "mean_bits": 16 * readers / d if case.mean == "kept" else 0.0,
        }

    def keys(self, case: Case) -> Codes:
        """Fit the code of each layer's keys, at the unbiased scale, means taken off."""
        if case.keys == "full":
            return {}
        if case.keys == "lattice":
            return {
                index: SignQuantizer(
                    basis,
                    self.comparison.key_centerings[index],
                    metric=self.comparison.query_metrics[index].float(),
                )
                for index, basis in self._lattices.items()
            }
        frame = "keys" if case.keys == "rotation" else case.frame
        return {
            index: LevelQuantizer(self.comparison.key_centerings[index], rotation, 1, "unbiased")
            for index, rotation in self.rotations(frame).items()
        }

    def queries(self, case: Case) -> dict[int, QueryCode]:
        """Fit what reads the queries of each layer that asks for coded keys, by its index."""
        if not case.frame and case.mean == "in":
            return {}
        return {
            reader: self._query_code(case, source, reader, states.queries[reader])
            for source, states in self.comparison.fit.items()
            for reader in states.queries
        }

    def _query_code(self, case: Case, source: int, reader: int, queries: Tensor) -> QueryCode:
        mean = queries.mean(1)
        if not case.frame:
            return lambda query: query - mean.unsqueeze(1).to(query)
        centred = case.mean != "in"
        if case.frame == "own":
            rotation = self.rotations("own", centred)[reader]
        else:
            rotation = self.rotations(case.frame, centred)[source]
            rotation = rotation.repeat_interleave(len(queries) // len(rotation), 0)
        centering = Centering("token_mean", mean) if centred else Centering("none")
        code = LevelQuantizer(centering, rotation, case.levels, case.rule)
        if case.mean == "dropped":
            return lambda query: code.reconstruct(query) - mean.unsqueeze(1).to(query)
        return code.reconstruct

    def rotations(self, frame: str, centred: bool = False) -> dict[int, Tensor]:
        """Learn a rotation for each KV head [H, D, D] by layer, or of ``own`` for each query head
        [Hq, D, D], by the layer that asks.

        ``centred``: learned on queries without their mean. Learned on as many vectors each, keys
        always without their mean.
        """
        fit, seed = self.comparison.fit, self.config.comparison.seed
        if frame == "srht":
            return {i: rotate_heads(s.keys, "srht", seed) for i, s in fit.items()}
        keys = self.comparison.centred_keys
        if frame == "keys":
            vectors = keys
        elif frame == "own":
            vectors = {
                reader: _without_mean(queries) if centred else queries
                for states in fit.values()
                for reader, queries in states.queries.items()
            }
        else:
            vectors = {index: pooled_queries(states, centred) for index, states in fit.items()}
        if frame == "both":
            vectors = {
                i: torch.cat([keys[i][:, ::2], queries[:, 1::2]], 1)
                for i, queries in vectors.items()
            }
        name = frame if frame == "keys" else f"{frame}, {'centred' if centred else 'as they are'}"
        return self.scratch.tensors(name, _learned, vectors, seed)

    @cached_property
    def _lattices(self) -> dict[int, Tensor]:
        return self.scratch.tensors("lattice", self._learn_lattices)

    def _learn_lattices(self) -> dict[int, Tensor]:
        return {
            index: learn_basis(keys, self.comparison.query_metrics[index], LatticeConfig())
            for index, keys in self.comparison.centred_keys.items()
        }


def mean_rows(fit: Mapping[int, LayerStates]) -> list[Row]:
    """Measure how much of the queries of each head their mean m is.

    ``energy``: ‖m‖² / E‖q‖². ``score``: the share of m·k in the variance of scores over the keys of
    a head, mᵀΣm / E qᵀΣq with the keys' covariance Σ: what is lost if the mean is left out.
    """
    rows: list[Row] = []
    for source, states in fit.items():
        centred = states.keys.double() - states.keys.double().mean(1, keepdim=True)
        covariance = centred.mT @ centred / centred.shape[1]
        for reader, queries in states.queries.items():
            groups = len(queries) // len(covariance)
            for head, query in enumerate(queries.double()):
                sigma, mean = covariance[head // groups], query.mean(0)
                rows.append(
                    {
                        "layer": reader,
                        "source": source,
                        "query_head": head,
                        "head": head // groups,
                        "energy": float(mean.square().sum() / query.square().sum(-1).mean()),
                        "score": float(
                            mean @ sigma @ mean / ((query @ sigma) * query).sum(-1).mean()
                        ),
                    }
                )
    return rows


def pooled_queries(states: LayerStates, centred: bool) -> Tensor:
    """Sample queries of all heads and layers that read each KV head, as many as keys, [H, N, D].

    ``centred``: each query head without its mean.
    """
    n_heads = len(states.keys)
    grouped = torch.cat(
        [
            (_without_mean(queries) if centred else queries).unflatten(0, (n_heads, -1))
            for queries in states.queries.values()
        ],
        1,
    )
    return grouped.flatten(1, 2)[:, :: grouped.shape[1]]


def _without_mean(queries: Tensor) -> Tensor:
    return queries - queries.mean(1, keepdim=True)


def _learned(vectors: Mapping[int, Tensor], seed: int) -> dict[int, Tensor]:
    return {i: learn_matrices(each, LearnConfig(seed=seed)) for i, each in vectors.items()}
