"""Codes of others on a real language model, as published and with the freedoms of our own.

A head's keys share a large vector. Codes that scale each token by itself, or take its signs, spend
their bits on it unless it is taken off; ours take it off, so the others are given that as well. And
ours are fitted to what queries see, so a product code and a scalar one are, too. The windows are
those of the lab *lengths* at the same length, and so are the tokens that stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor

from signlattice.errors import check_counts
from signlattice.evaluation.through_cache import Judge
from signlattice.models.passages import full_windows
from signlattice.models.states import LayerStates, read_states
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.basis import LatticeConfig, query_metric
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.factory import rotate_heads
from signlattice_paper.baselines.centred import Centred
from signlattice_paper.baselines.metric import Allocated, Balanced, InMetric
from signlattice_paper.baselines.nsnquant import NSNQuantLike
from signlattice_paper.baselines.product import ProductQuantizer
from signlattice_paper.baselines.rounding import Rounded
from signlattice_paper.baselines.rules import Rule, grouped, ruled_cache, sized, unfitted
from signlattice_paper.baselines.turboquant import TurboQuant
from signlattice_paper.experiments.lengths import judge_at
from signlattice_paper.experiments.runner import Lab, Tables
from signlattice_paper.records import Row


@dataclass(frozen=True)
class PeersConfig:
    """On what codes are fitted and judged.

    Attributes:
        text: to calibrate and evaluate on, as `texts.read_text` takes it.
        context: tokens of a window.
        fit_windows: that codes are fitted on.
        windows: that are judged.
        window, sinks: latest and first tokens that stay whole; codes that take tokens in blocks
            have as many latest ones and no sinks.
        every: tokens between those that losses are measured on.
        step: tokens of a call.

    Raises:
        InputError: on a count below 1.
    """

    text: str = "wiki"
    context: int = 2048
    fit_windows: int = 16
    windows: int = 4
    window: int = 64
    sinks: int = 4
    every: int = 4
    step: int = 1024

    def __post_init__(self) -> None:
        check_counts(self, "context", "fit_windows", "windows", "every", "step")


@dataclass(frozen=True)
class Peer:
    """A code of keys and one of values by a published rule, and where it is from.

    ``centred``: the mean is taken off the keys first, which is not in the publication.
    ``metric``: the same, and the code is fitted in the metric of the queries.
    """

    name: str
    source: str
    keys: Rule
    values: Rule
    centred: bool = False
    metric: bool = False

    def __str__(self) -> str:
        return f"{self.name}{', centred' if self.centred else ''}"


def peers() -> list[Peer]:
    """List the codes, each as published and, where that has the mean in it, centred as well."""
    turbo, nsn = "Zandieh et al. 2025, arXiv 2504.19874", "Son et al. 2025, arXiv 2505.18231"
    kivi = "Liu et al. 2024, arXiv 2402.02750"
    product = "Jégou et al. 2011, doi 10.1109/TPAMI.2010.57"
    balanced = "Ge et al. 2013, doi 10.1109/CVPR.2013.379, in our metric"
    transform = "Goyal 2001, doi 10.1109/79.952802, in our metric"
    four = grouped(4)
    by_channel = unfitted(Rounded, bits_per_level=2, size=32, along="tokens")
    two = sized(TurboQuant, bits_per_level=2)
    listed = [
        Peer("KIVI-2", kivi, by_channel, grouped(2, 32)),
        Peer("TurboQuant-mse 2", turbo, two, two),
        Peer("NSNQuant-like 1, V 4", nsn, sized(NSNQuantLike, bits_per_level=1), four),
        Peer("SRHT signs, V 4", "this library", _srht_signs, four),
        Peer("PQ-1, V 4", product, ProductQuantizer.fit, four),
        Peer("PQ-1 in the metric, V 4", balanced, _balanced_product, four, metric=True),
        Peer("scalar 1 in the metric, V 4", transform, Allocated.fit, four, metric=True),
    ]
    # the others centre, or learn the mean
    return listed + [replace(peer, centred=True) for peer in listed if peer.source == turbo]


class PeersLab(Lab[PeersConfig, Peer]):
    """Tables "exact" (one row) and "peers", a row for each code.

    ``bits`` are those of a coded coordinate, keys and values together, scales counted;
    ``effective_bits`` add the tokens that are whole, at the length judged. Running raises
    ``InputError`` as `passages.full_windows` does.
    """

    def cases(self) -> list[Peer]:
        """List the codes."""
        return peers()

    def measure(self, case: Peer) -> Tables:
        """Measure a code and return its row."""
        keys = {index: self._fitted(case, states) for index, states in self.states.items()}
        values = {index: case.values(states.values) for index, states in self.states.items()}
        caches = ruled_cache(self.judge.loaded, keys, values, self.config.window, self.config.sinks)
        judged = self.judge.judged(caches.new_cache, with_needles=False)
        row: Row = {
            "name": case.name,
            "centred": case.centred,
            "source": case.source,
            "static_bytes": caches.static_bytes,
        }
        return {"peers": [row | judged]}

    def _fitted(self, case: Peer, states: LayerStates) -> Quantizer:
        rule = case.keys
        if case.metric:
            queries, n_heads = list(states.queries.values()), len(states.keys)
            metric = query_metric(queries, n_heads, LatticeConfig())
            rule = partial(InMetric.fit, metric=metric, rule=case.keys)
        centred = case.centred or case.metric
        return Centred.fit(states.keys, rule) if centred else rule(states.keys)

    def summarise(self, tables: Tables) -> Tables:
        """Add what exact attention reads."""
        return {"exact": [self.judge.exact_row(with_needles=False)], **tables}

    @cached_property
    def judge(self) -> Judge:
        """Judge caches by what the model says through them."""
        config = self.config
        return judge_at(
            self.loaded, self.text, config.context, config.windows, config.every, config.step
        )

    @cached_property
    def states(self) -> Mapping[int, LayerStates]:
        """Keys and values of the layers that see all tokens, on calibration text."""
        loaded = self.judge.loaded
        pieces = full_windows(loaded, self.text.calibration, self.config.fit_windows)
        return read_states(loaded, pieces, batch_size=1)


def _balanced_product(vectors: Tensor) -> Quantizer:
    return Balanced.fit(vectors, ProductQuantizer.fit)


def _srht_signs(keys: Tensor) -> Quantizer:
    centering = Centering.fit(keys, "token_mean")
    return SignQuantizer(rotate_heads(keys, "srht", seed=0), centering, "unbiased")
