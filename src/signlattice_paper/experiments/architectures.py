"""The paper's tables on one model, mini or full-size: what its keys are, and what signs cost them.

A run captures keys to disk, learns a rotation of every head and of every layer's heads together,
and evaluates on other text. What is done is kept in a scratch folder: a run that was interrupted
goes on where it was and ends with the same tables.

Processes can share out captures and rotations, which take most of the time. `measure`, in the lab
notebook, then goes on from what they leave::

    torchrun --nproc-per-node 8 -m signlattice_paper prepare OLMoE-1B-7B
    make lab MODEL=OLMoE-1B-7B PROFILE=full
"""

from __future__ import annotations

import math
import shutil
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from signlattice import __version__, hadamard
from signlattice.alignment import beta, elliptical_ceiling
from signlattice.data.texts import Text
from signlattice.distributed.capture import capture_parts
from signlattice.distributed.workers import Workers
from signlattice.errors import InputError, check_counts
from signlattice.evaluation.bootstrap import Interval
from signlattice.evaluation.perplexity import (
    TokenLosses,
    gap_ratio,
    perplexity,
    perplexity_gap,
    token_losses,
)
from signlattice.io import (
    Progress,
    check_free_space,
    check_writable,
    identity,
    keep_json,
    keep_tensors,
    kept_json,
    kept_tensors,
    no_progress,
)
from signlattice.models import full_size
from signlattice.models.capture import StateBank, draw_tokens
from signlattice.models.hooks import AttentionLayer, attention_layers
from signlattice.models.loading import LoadedModel, load_model
from signlattice.models.minis import MINIS
from signlattice.models.passages import Passage, passages, spread, take_tokens
from signlattice.quantizers.centering import CENTERING_METHODS, Centering, CenteringMethod
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.scales import SCALE_RULES, ScaleRule
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations import fixed
from signlattice.rotations.config import (
    SAFE_KEYS_PER_DIM,
    CalibrationWarning,
    LearnConfig,
    LearnedRotation,
    Solver,
)
from signlattice.rotations.learned import learn_rotation, learn_rotations
from signlattice.rotations.null import noise_null
from signlattice_paper.experiments.convergence import LATE_TARGET, LEFT, TARGET, first_step
from signlattice_paper.experiments.curvature import plane_curvatures
from signlattice_paper.records import Row

ROTATIONS = ("identity", "srht", "pca_hadamard", "learned")
SCOPES = ("head", "layer")

PART = 64
"""Passages that are captured to one folder: what an interruption loses at most."""

SPARE = 1.25
"""Keys captured, over those of the largest sample: seeds sample from all."""

TEMPERATURES = (0.0, 0.1)
"""That round the corner of |y| for the Hessian; zero leaves the corner out."""

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class ArchitectureConfig:
    """Choose what is measured of a model.

    Attributes:
        text: to calibrate and evaluate on: a name or a path, as `texts.read_text` takes it.
        keys_per_dim: calibration keys per coordinate, fewer where the text has fewer; the same for
            every head size, so that sizes can be compared.
        n_held_out: most held-out keys of a head.
        windows: windows of the context read of each document; None reads all.
        n_passages: most passages that perplexity is measured on.
        batch_size: passages read at once.
        context: tokens of a window; None is the model's own, at most 2048.
        seeds: of the sample of keys, the SRHT and the solver.
        solver: that learns.
        steps: of the solvers; None is as many as each takes by itself.
        layer_scope: whether one rotation of all heads of a layer is learned too, by one seed.
        trace_every: steps between points of a trace.

    Raises:
        InputError: on no seed, or a count below 1.
    """

    text: str = "corpus"
    keys_per_dim: int = SAFE_KEYS_PER_DIM
    n_held_out: int = 8192
    windows: int | None = 2
    n_passages: int = 400
    batch_size: int = 16
    context: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    solver: Solver = "annealed"
    steps: int | None = None
    layer_scope: bool = True
    trace_every: int = 10

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("seeds is empty: give one or more")
        counts = ("keys_per_dim", "n_held_out", "n_passages", "batch_size", "trace_every")
        check_counts(self, *counts)
        self.learning(0)

    def learning(self, seed: int) -> LearnConfig:
        """Say how a rotation is learned. Raises ``InputError`` on an unknown solver."""
        return LearnConfig(
            solver=self.solver, seed=seed, steps=self.steps, trace_every=self.trace_every
        )


PROFILES = {
    "mini": ArchitectureConfig(),
    "full": ArchitectureConfig(text="wikitext", n_held_out=16384, windows=None, batch_size=1),
}


def configured(profile: str, text: str = "", context: int = 0, **changes) -> ArchitectureConfig:
    """Return the configuration of a profile, with the text and context that are given.

    Raises ``InputError`` on an unknown profile, and as `ArchitectureConfig` does.
    """
    if profile not in PROFILES:
        raise InputError(f"profile={profile!r}: choose one of {', '.join(PROFILES)}")
    if text:
        changes["text"] = str(text)
    if context:
        changes["context"] = context
    return replace(PROFILES[profile], **changes)


def load(
    name: str,
    config: ArchitectureConfig,
    *,
    revision: str = "",
    dtype: str = "auto",
    device_map: str = "auto",
) -> LoadedModel:
    """Return a mini by its name, or any decoder by its name on the hub or its folder.

    Raises as `loading.load_model` and `full_size.load_full` do.
    """
    if name in MINIS:
        loaded = load_model(name)
        return replace(loaded, context=config.context or loaded.context)
    return full_size.load_full(
        name,
        revision=revision or None,
        dtype=dtype,
        context=config.context,
        device_map=device_map,
    )


def estimate(
    name: str, config: ArchitectureConfig, revision: str = "", dtype: str = "auto"
) -> tuple[tuple[str, str], ...]:
    """Estimate the cost of a full-size model, in rows of (what, how much); none for a mini.

    Raises as `full_size.preflight` does.
    """
    if name in MINIS:
        return ()
    found = full_size.preflight(
        name, revision=revision or None, dtype=dtype, context=config.context
    )
    widest = max(h * d if config.layer_scope else d for _, h, d in found.keys)
    return found.table(math.ceil(SPARE * widest * config.keys_per_dim))


@dataclass(frozen=True)
class Measured:
    """Hold the results of a run: tables of rows, the exact perplexity, and the learned codec.

    ``tables``: "layers" what each layer attends with; "beta" per scope, rotation and centering with
    its spreads; "lifts" of beta by centering; "heads" every rotation on each head and each layer;
    "null" the noise null; "steps" of learning, and "traces" on the first layer; "planes" the
    Hessian by planes; "gaps" perplexity gaps; "ratios" of gaps.
    """

    tables: dict[str, list[Row]]
    exact: Interval
    codec: KeyCodec
    n_compressed: int


def measure(
    loaded: LoadedModel,
    text: Text,
    config: ArchitectureConfig,
    scratch: Path,
    progress: Progress | None = None,
) -> Measured:
    """Run everything; what an interrupted run left in ``scratch`` is not done again.

    Rotations and means are fitted on the calibration side of ``text``, every number but those named
    in-sample is of its evaluation side.

    Raises ``InputError`` on a text with fewer calibration tokens than a head has coordinates, or a
    head size that no rotation exists for; ``IntegrityError`` on a damaged file in ``scratch``.
    """
    scratch = scratch / _identity(loaded, text, config)
    tell = progress or no_progress
    layers = attention_layers(loaded.model)
    pieces, fits = _prepared(loaded, text, config, scratch, tell, Workers())
    null = _null(fits, config, scratch, tell)
    gaps, ratios, exact, codec, compressed = _gaps(loaded, pieces, fits, config, scratch, tell)
    heads, first = _head_rows(fits), min(fit.layer for fit in fits)
    tables = {
        "layers": [layer_row(layer) for layer in layers.values()],
        "beta": _beta_rows(fits),
        "lifts": _lift_rows(heads),
        "heads": heads,
        "null": null,
        "steps": [row for fit in fits for row in fit.rows("steps")],
        "traces": [row for fit in fits if fit.layer == first for row in fit.rows("traces")],
        "planes": [row for fit in fits for row in fit.rows("planes")],
        "gaps": gaps,
        "ratios": ratios,
    }
    shutil.rmtree(scratch / "keys", ignore_errors=True)
    return Measured(tables, exact, codec, compressed)


def prepare(
    loaded: LoadedModel,
    text: Text,
    config: ArchitectureConfig,
    scratch: Path,
    progress: Progress | None = None,
    workers: Workers = Workers(),
) -> None:
    """Capture the keys and fit the rotations of `measure`, which goes on from there.

    All ``workers`` call this with one ``scratch`` folder: passages and layers are shared out, and
    the tables do not depend on how many processes there were, given as many threads to each.

    Raises as `measure` does.
    """
    scratch = scratch / _identity(loaded, text, config)
    _prepared(loaded, text, config, scratch, progress or no_progress, workers)
    workers.barrier()


def _prepared(
    loaded: LoadedModel,
    text: Text,
    config: ArchitectureConfig,
    scratch: Path,
    tell: Progress,
    workers: Workers,
) -> tuple[list[Passage], list[_Fit]]:
    """Fit this process's share of the layers. Returns the passages to evaluate on, too."""
    layers = attention_layers(loaded.model)
    owners = {i: layer for i, layer in layers.items() if layer.owns_keys}
    for layer in owners.values():
        fixed.srht(layer.head_dim, 0)  # raises where there is none of this size
    pieces = passages(loaded, text.evaluation, config.windows)
    pieces = spread(pieces, config.n_passages)
    keys = _captured(loaded, text, pieces, owners, config, scratch / "keys", tell, workers)
    own = workers.share(list(owners))
    return pieces, list(_fits(keys, owners, own, config, scratch, tell))


def n_parts(loaded: LoadedModel, config: ArchitectureConfig) -> int:
    """Count how often `measure` reports progress, but for captures."""
    n_layers = sum(layer.owns_keys for layer in attention_layers(loaded.model).values())
    wide = n_layers * len(CENTERING_METHODS) if config.layer_scope else 0
    return n_layers * len(CENTERING_METHODS) * len(config.seeds) + wide + len(_codes(config)) + 2


# Keys.


@dataclass(frozen=True, eq=False)
class _Keys:
    """Captured keys of both sides."""

    calibration: StateBank
    held_out: StateBank


def _captured(
    loaded: LoadedModel,
    text: Text,
    pieces: Sequence[Passage],
    owners: dict[int, AttentionLayer],
    config: ArchitectureConfig,
    folder: Path,
    tell: Progress,
    workers: Workers,
) -> _Keys:
    fit = passages(loaded, text.calibration, config.windows)
    widest = max(
        layer.head_dim * (layer.n_heads if config.layer_scope else 1) for layer in owners.values()
    )
    fit = take_tokens(fit, math.ceil(SPARE * widest * config.keys_per_dim))
    judged = take_tokens(pieces, config.n_held_out)
    n_tokens = sum(len(piece.ids) for piece in fit)
    narrowest = min(layer.head_dim for layer in owners.values())
    if n_tokens < narrowest:
        raise InputError(
            f"the calibration side of {text.name} has {n_tokens} tokens: "
            f"give at least {narrowest}, one for each coordinate of a head"
        )
    if workers.leads:
        n_keys = n_tokens + sum(len(piece.ids) for piece in judged)
        per_token = sum(layer.n_heads * layer.head_dim for layer in owners.values())
        n_bytes = n_keys * per_token * loaded.model.dtype.itemsize
        there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        check_writable(folder)
        check_free_space(
            folder,
            n_bytes - there,
            f"the keys of {n_keys} tokens of {loaded.name}",
            "ask for fewer keys_per_dim",
        )
    banks = [
        capture_parts(
            loaded,
            [chosen[start : start + PART] for start in range(0, len(chosen), PART)],
            folder / side,
            workers,
            states=("keys",),
            batch_size=config.batch_size,
            progress=partial(tell, f"captured {side}"),
        )
        for side, chosen in (("calibration", fit), ("held_out", judged))
    ]
    return _Keys(*banks)


def sample_tokens(keys: Tensor, n_keys: int, seed: int) -> Tensor:
    """Return at most ``n_keys`` of keys [H, N, D], in their order."""
    if keys.shape[1] <= n_keys:
        return keys
    return keys[:, draw_tokens(keys.shape[1], n_keys, seed)]


def _wide(keys: Tensor) -> Tensor:
    """Return the heads of [H, N, D] side by side: [1, N, H·D]."""
    return keys.transpose(0, 1).flatten(1)[None]


# Rotations, and what is measured on keys.


@dataclass(frozen=True, eq=False)
class _Fit:
    """All rotations of one layer, scope, centering and seed, and what was measured with them.

    ``matrices`` [H, d, d] per rotation; ``values`` what `_measured` returns.
    """

    layer: int
    scope: str
    centering: Centering
    seed: int
    matrices: dict[str, Tensor]
    values: dict

    @property
    def at(self) -> dict:
        """Return the columns that its rows begin with."""
        return {
            "scope": self.scope,
            "layer": self.layer,
            "d": self.values["d"],
            "centering": self.centering.method,
        }

    def rows(self, kind: str) -> Iterator[Row]:
        """Rows of one of the tables that only some fits have."""
        for row in self.values[kind]:
            yield self.at | row


def _fits(
    keys: _Keys,
    owners: dict[int, AttentionLayer],
    indices: Sequence[int],
    config: ArchitectureConfig,
    scratch: Path,
    tell: Progress,
) -> Iterator[_Fit]:
    """Fit the layers ``indices``: each head by every seed, and the heads together by the first.

    How learning goes is looked at with the first seed; the paper's own trainer runs on the first
    layer, with the paper's centering.
    """
    first = config.seeds[0]
    for index in indices:
        layer = owners[index]
        banks = keys.calibration.keys(index), keys.held_out.keys(index)
        for scope in SCOPES if config.layer_scope else SCOPES[:1]:
            narrow = scope == "head"
            if not narrow and layer.n_heads > 1:
                banks = tuple(map(_wide, banks))
            d = banks[0].shape[-1]
            if not hadamard.supported_head_dim(d):
                continue  # no Hadamard matrix for all heads together: each alone is measured
            fit, held_out = banks
            held_out = sample_tokens(held_out, config.n_held_out, 0)
            kept = scope if layer.n_heads > 1 else "head"  # one head is the whole layer
            for seed in config.seeds if narrow else (first,):
                chosen = sample_tokens(fit, config.keys_per_dim * d, seed)
                for method in CENTERING_METHODS:
                    solvers = (config.solver,) if seed == first else ()
                    if solvers and method == "dc" and index == min(owners):
                        solvers += ("gradient",)
                    file = scratch / f"{index}.{kept}.{method}.{seed}.safetensors"
                    name = (index, scope, method, seed)
                    yield _fit(name, chosen, held_out, config, file, solvers)
                    tell(f"learned layer {index}, {scope}")


def _fit(
    name: tuple[int, str, str, int],
    keys: Tensor,
    held_out: Tensor,
    config: ArchitectureConfig,
    file: Path,
    watched: tuple[str, ...],
) -> _Fit:
    """Fit and measure, or load what an earlier run did; ``watched`` solvers leave traces."""
    index, scope, method, seed = name
    keys, held_out = _nonzero(keys), _nonzero(held_out)
    centering = Centering.fit(keys, cast(CenteringMethod, method))
    if not file.exists():
        fit, judged = (_nonzero(centering.split(part)[0]) for part in (keys, held_out))
        part = file.with_suffix(".part")
        matrices, values = _measured(fit, judged, seed, config, part, watched)
        keep_tensors(file, matrices, values)
        part.unlink(missing_ok=True)
    kept, values = kept_tensors(file)
    matrices = {rotation: kept[rotation] for rotation in ROTATIONS}
    return _Fit(index, scope, centering, seed, matrices, values)


def _nonzero(keys: Tensor) -> Tensor:
    """Keys [H, N, d] of those tokens whose keys are zero in no head: zero has no direction.

    A padding token that begins a text has such keys, for instance.
    """
    return keys[:, (keys.abs().amax(-1) > 0).all(0)]


def _measured(
    keys: Tensor,
    held_out: Tensor,
    seed: int,
    config: ArchitectureConfig,
    checkpoint: Path,
    watched: tuple[str, ...],
) -> tuple[dict[str, Tensor], dict]:
    """Rotations [H, d, d] of centred keys [H, N, d], and what they do to the held-out ones."""
    keys, held_out = keys.to(_DEVICE), held_out.to(_DEVICE)
    n_heads, n_keys, d = keys.shape
    learn = config.learning(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # the table says N/d beside the null
        learned = learn_rotations(keys, learn, held_out=held_out, checkpoint=checkpoint)
        traced = {
            solver: learned[0]
            if solver == config.solver
            else learn_rotation(keys[0], replace(learn, solver=solver), held_out=held_out[0])
            for solver in watched
        }
    matrices = {
        "identity": torch.stack([fixed.identity(d)] * n_heads),
        "srht": torch.stack([fixed.srht(d, seed + head) for head in range(n_heads)]),
        "pca_hadamard": torch.stack([fixed.pca_hadamard(head.cpu()) for head in keys]),
        "learned": torch.stack([head.matrix.cpu() for head in learned]),
    }
    found = {
        name: [beta(x @ r.T.to(x)) for x, r in zip(held_out, stack)]
        for name, stack in matrices.items()
    }
    of_first = {name: stack[0] for name, stack in matrices.items()}
    return matrices, {
        "d": d,
        "n_keys": n_keys,
        "beta": found,
        "in_sample": [head.train_beta for head in learned],
        "ceiling": [ceiling_of(head) for head in held_out],
        "steps": [steps_row(name, one) for name, one in traced.items()],
        "traces": [row for name, one in traced.items() for row in trace_rows(name, one)],
        "planes": _plane_rows(held_out[0], of_first) if watched else [],
    }


def ceiling_of(keys: Tensor) -> float:
    """Return the elliptical ceiling of the scatter of keys [N, d]."""
    keys = keys.double()
    return elliptical_ceiling(torch.linalg.eigvalsh(keys.T @ keys).clamp_min(0).cpu())


def steps_row(solver: str, learned: LearnedRotation) -> Row:
    """When learning reached the paper's marks, and 99 % of its lift, in sample and held out."""
    trace = learned.trace
    row: dict = {"solver": solver, "n_keys": learned.n_keys, "steps": trace[-1].step}
    for name, which in (("in_sample", "train_beta"), ("held_out", "held_out_beta")):
        start, end = (getattr(point, which) for point in (trace[0], trace[-1]))
        mark = start + 0.99 * (end - start)
        row[f"to_target_{name}"] = first_step(trace, TARGET, which)
        row[f"to_late_target_{name}"] = first_step(trace, LATE_TARGET, which)
        row[f"to_99_{name}"] = first_step(trace, mark, which) if end - start > LEFT else None
        row[f"end_{name}"] = end
    return row


def trace_rows(solver: str, learned: LearnedRotation) -> list[Row]:
    """List the points of a trace."""
    return [
        {
            "solver": solver,
            "step": point.step,
            "in_sample": point.train_beta,
            "held_out": point.held_out_beta,
        }
        for point in learned.trace
    ]


def _plane_rows(keys: Tensor, matrices: dict[str, Tensor]) -> list[Row]:
    """Return the Hessian by planes at every rotation [d, d] of held-out keys [N, d].

    Planes are ranked on one half of the keys and judged on the other.
    """
    rows: list[Row] = []
    for name, matrix in matrices.items():
        for temperature in TEMPERATURES:
            ours, others = (
                plane_curvatures(half, matrix.to(half), temperature).cpu()
                for half in (keys[::2], keys[1::2])
            )
            judged = others[ours.argsort()]
            outermost = max(1, len(judged) // 100)
            rows.append(
                {
                    "rotation": name,
                    "temperature": temperature,
                    "lowest": judged[:outermost].mean().item(),
                    "mean": judged.mean().item(),
                    "highest": judged[-outermost:].mean().item(),
                    "up": (judged > 0.05).double().mean().item(),
                    "down": (judged < -0.05).double().mean().item(),
                }
            )
    return rows


def _null(
    fits: Sequence[_Fit], config: ArchitectureConfig, scratch: Path, tell: Progress
) -> list[Row]:
    """Measure the solver on Gaussian noise of every number of keys and size that occurs."""
    rows: list[Row] = []
    for d, n_keys in sorted({(fit.values["d"], fit.values["n_keys"]) for fit in fits}):
        file = scratch / f"null.{d}.{n_keys}.json"
        if not file.exists():
            found = noise_null(n_keys, d, config.learning(0), device=_DEVICE)
            keep_json(file, found)
        in_sample, held_out = kept_json(file)
        rows.append(
            {
                "d": d,
                "n_keys": n_keys,
                "keys_per_dim": n_keys / d,
                "in_sample": in_sample,
                "held_out": held_out,
            }
        )
    tell("the noise null")
    return rows


# Perplexity.


def _codes(config: ArchitectureConfig) -> list[tuple[str, str, str, int]]:
    """(rotation, centering, scale, seed) of every code that perplexity is measured through."""
    first, *others = config.seeds
    scales = [rule for rule in SCALE_RULES if rule != "norm"]
    codes = [(r, c, s, first) for r in ROTATIONS for c in CENTERING_METHODS for s in scales]
    return codes + [(r, "token_mean", "unbiased", s) for r in ("srht", "learned") for s in others]


def _gaps(
    loaded: LoadedModel,
    pieces: Sequence[Passage],
    fits: Sequence[_Fit],
    config: ArchitectureConfig,
    scratch: Path,
    tell: Progress,
) -> tuple[list[Row], list[Row], Interval, KeyCodec, int]:
    def losses_of(name: str, codec: KeyCodec | None) -> TokenLosses:
        file = scratch / f"losses.{name}.safetensors"
        if not file.exists():
            found = token_losses(loaded, pieces, codec, batch_size=config.batch_size)
            kept = {"nll": torch.from_numpy(found.nll), "n": torch.tensor([found.n_compressed])}
            keep_tensors(file, kept)
        kept, _ = kept_tensors(file)
        nll, n = kept["nll"].numpy(), int(kept["n"][0])
        n_tokens = np.array([len(piece.ids) - 1 for piece in pieces])
        none = np.zeros_like(nll)
        tell("perplexity")
        return TokenLosses(tuple(pieces), nll, n_tokens, none, none, n)

    exact, losses, rows = losses_of("exact", None), {}, []
    for code in _codes(config):
        rotation, method, scale, seed = code
        losses[code] = losses_of(".".join(map(str, code)), _codec(loaded, fits, code))
        gap, own = perplexity_gap(losses[code], exact), perplexity(losses[code])
        rows.append(
            {
                "rotation": rotation,
                "centering": method,
                "scale": scale,
                "seed": seed,
                "perplexity": own.value,
                "gap": gap.value,
                "low": gap.low,
                "high": gap.high,
            }
        )
    ratios = [
        {"centering": method, "scale": scale, "seed": seed}
        | _ratio(losses["srht", method, scale, seed], losses["learned", method, scale, seed], exact)
        for rotation, method, scale, seed in losses
        if rotation == "learned"
    ]
    best = ("learned", "token_mean", "unbiased", config.seeds[0])
    return rows, ratios, perplexity(exact), _codec(loaded, fits, best), losses[best].n_compressed


def _codec(loaded: LoadedModel, fits: Sequence[_Fit], code: tuple[str, str, str, int]) -> KeyCodec:
    rotation, method, scale, seed = code
    layers = {
        fit.layer: SignQuantizer(fit.matrices[rotation], fit.centering, cast(ScaleRule, scale))
        for fit in fits
        if (fit.scope, fit.centering.method, fit.seed) == ("head", method, seed)
    }
    words = {"rotation": rotation, "centering": method, "scale": scale, "seed": str(seed)}
    return KeyCodec(dict(layers), loaded.weights_hash, words | {"signlattice": __version__})


def _ratio(worse: TokenLosses, better: TokenLosses, exact: TokenLosses) -> Row:
    """Return a gap ratio with its interval; None where the better gap may be zero, or is none."""
    gap = perplexity_gap(better, exact)
    if gap.low <= 0:
        return {"ratio": None, "low": None, "high": None}
    found = gap_ratio(worse, better, exact)
    return {"ratio": found.value, "low": found.low, "high": found.high}


# Tables.


def layer_row(layer: AttentionLayer) -> Row:
    """Describe the attention of a layer, and whether a mean off its keys cancels exactly."""
    return asdict(layer) | {"mean_cancels": layer.mean_cancels}


def _beta_rows(fits: Sequence[_Fit]) -> list[Row]:
    """Per scope, centering and rotation: mean over seeds, layers and heads, and three spreads.

    ``head_std`` is over all heads, of their means over seeds; ``layer_std`` over layers likewise;
    ``seed_std`` over seeds, of their means over heads. None where there is one.
    """
    rows: list[Row] = []
    for scope in SCOPES:
        for method in CENTERING_METHODS:
            group = [f for f in fits if (f.scope, f.centering.method) == (scope, method)]
            if not group:
                continue
            ceiling = statistics.fmean(v for f in group for v in f.values["ceiling"])
            in_sample = statistics.fmean(v for f in group for v in f.values["in_sample"])
            for rotation in ROTATIONS:
                found = {(f.layer, f.seed): f.values["beta"][rotation] for f in group}
                heads = _means_over_seeds(found)
                seeds = {seed for _, seed in found}
                by_seed = [
                    statistics.fmean(v for (_, s), vs in found.items() if s == seed for v in vs)
                    for seed in seeds
                ]
                every = [value for values in heads.values() for value in values]
                rows.append(
                    {
                        "scope": scope,
                        "centering": method,
                        "rotation": rotation,
                        "beta": statistics.fmean(every),
                        "head_std": _std(every),
                        "layer_std": _std([statistics.fmean(v) for v in heads.values()]),
                        "seed_std": _std(by_seed),
                        "lowest": min(every),
                        "highest": max(every),
                        "n_heads": len(every),
                        "n_seeds": len(seeds),
                        "ceiling": ceiling,
                        "in_sample": in_sample if rotation == "learned" else None,
                    }
                )
    return rows


def _head_rows(fits: Sequence[_Fit]) -> list[Row]:
    """Per layer and head, or layer as a whole: every rotation's held-out beta, mean over seeds."""
    rows: list[Row] = []
    for key in dict.fromkeys((f.layer, f.scope, f.centering.method) for f in fits):
        group = [f for f in fits if (f.layer, f.scope, f.centering.method) == key]
        found = {
            name: _means_over_seeds({(f.layer, f.seed): f.values["beta"][name] for f in group})[
                key[0]
            ]
            for name in ROTATIONS
        }
        for head in range(len(found["learned"])):
            learned = [f.values["beta"]["learned"][head] for f in group]
            rows.append(
                group[0].at
                | {"head": head, "n_keys": group[0].values["n_keys"]}
                | {name: values[head] for name, values in found.items()}
                | {
                    "learned_std": _std(learned),
                    "in_sample": statistics.fmean(f.values["in_sample"][head] for f in group),
                    "ceiling": statistics.fmean(f.values["ceiling"][head] for f in group),
                }
            )
    return rows


def _lift_rows(heads: Sequence[Row]) -> list[Row]:
    """By how much a centering moves the held-out beta of a rotation: mean and range over heads."""
    rows: list[Row] = []
    for scope in dict.fromkeys(row["scope"] for row in heads):
        of = {
            method: [r for r in heads if (r["scope"], r["centering"]) == (scope, method)]
            for method in CENTERING_METHODS
        }
        for method in CENTERING_METHODS[1:]:
            for rotation in ROTATIONS:
                pairs = zip(of[method], of["none"], strict=True)
                lifts = [after[rotation] - before[rotation] for after, before in pairs]
                rows.append(
                    {
                        "scope": scope,
                        "centering": method,
                        "rotation": rotation,
                        "lift": statistics.fmean(lifts),
                        "head_std": _std(lifts),
                        "lowest": min(lifts),
                        "highest": max(lifts),
                        "n_heads": len(lifts),
                    }
                )
    return rows


def _means_over_seeds(found: dict[tuple[int, int], list[float]]) -> dict[int, list[float]]:
    layers = dict.fromkeys(layer for layer, _ in found)
    return {
        layer: [
            statistics.fmean(column)
            for column in zip(*(values for (own, _), values in found.items() if own == layer))
        ]
        for layer in layers
    }


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _identity(loaded: LoadedModel, text: Text, config: ArchitectureConfig) -> str:
    """Hash what kept results depend on."""
    known = [loaded.weights_hash, str(loaded.model.dtype), text.fingerprint, __version__]
    settings = asdict(config) | {"text": None, "batch_size": None}
    return identity(known, settings)
