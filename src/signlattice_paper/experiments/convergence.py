"""How long learning takes, where it waits, and what the objective's curvature is on its way.

Measured for the paper's S6: steps to a mark against dimension and number of keys, the plateau at
the start, how much of a first gradient is signal, spectra of the Hessian, and a second sign code.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from signlattice.alignment import GAUSSIAN_BETA, beta, cosine, haar_beta
from signlattice.data.texts import Text
from signlattice.errors import InputError, check_counts
from signlattice.models.loading import LoadedModel
from signlattice.rotations import fixed, synthetic
from signlattice.rotations.config import (
    SOLVERS,
    CalibrationWarning,
    LearnConfig,
    LearnedRotation,
    ProgressReport,
    Solver,
    TracePoint,
)
from signlattice.rotations.learned import learn_rotation
from signlattice.rotations.synthetic import PLANTED_NOISE, KeySet
from signlattice_paper.experiments import solvers
from signlattice_paper.experiments.curvature import geodesic, hessian, random_direction, slope
from signlattice_paper.experiments.runner import Lab, TableCase, Tables
from signlattice_paper.records import Row

MARKS = (50, 200, 500)
"""The steps at which the paper reports."""

TARGET = 0.85
LATE_TARGET = 0.92
"""The values of beta that the paper reports steps to."""

LEFT = 0.01
"""A solver has left the plateau when its held-out beta is this much above the floor."""

_KEPT = (0, 5, 10, 15, 20, 25, 30, 40, 50, 65, 80, 100, 130, 160, 200, 250, 300, 400, 500)
_RANKS = 32  # groups that the directions of a Hessian are averaged in


@dataclass(frozen=True)
class ConvergenceConfig:
    """Choose what is measured.

    Attributes:
        planted: (d, N) of planted keys, for all three solvers.
        noise: (d, N) of Gaussian keys, for the paper's trainer.
        model: (heads side by side, N) of a model's keys in ``layers``, for all three solvers.
        layers: of the model.
        windows: context windows read of each document.
        plateau_dims, plateau_seeds: planted keys on which the plateau is timed.
        keys_per_dim: their N/d.
        plateau_steps: after which ``gradient`` and ``itq`` are given up there.
        signal_dims: planted keys on which first gradients are compared, N/d as above.
        signal_draws: random rotations that a comparison averages over.
        scan_dim: of the planted keys whose Hessian is taken.
        scan_keys: keys to learn from and keys to judge by, for the Hessian.
        temperatures: that round the corner of |y| for the Hessian; 0 leaves it out.
        trace_every: steps between points of a trace, and so the grain of steps to a mark.
        seed: of keys, rotations and solvers.

    Raises:
        InputError: on an empty choice or a count below 1.
    """

    planted: tuple[tuple[int, int], ...] = tuple(
        (d, ratio * d) for d in (32, 64, 128) for ratio in (2, 8, 32, 128)
    )
    noise: tuple[tuple[int, int], ...] = (
        *((d, 1024) for d in (32, 64, 128, 256, 512)),
        *((d, ratio * d) for ratio in (2, 4, 8) for d in (32, 64, 128, 256)),
    )
    model: tuple[tuple[int, int], ...] = (
        (1, 1024),
        (2, 1024),
        (4, 1024),
        (1, 512),
        (4, 2048),
        (1, 8192),
    )
    layers: tuple[int, ...] = (0, 2)
    windows: int = 2
    plateau_dims: tuple[int, ...] = (16, 24, 32, 48, 64, 80)
    plateau_seeds: tuple[int, ...] = (0, 1, 2)
    keys_per_dim: int = 128
    plateau_steps: int = 1500
    signal_dims: tuple[int, ...] = (16, 24, 32, 48, 64, 96, 128)
    signal_draws: int = 16
    scan_dim: int = 64
    scan_keys: int = 32768
    temperatures: tuple[float, ...] = (0.0, 0.1)
    trace_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("planted", "noise", "model", "layers", "temperatures"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: give one or more")
        counts = ("windows", "keys_per_dim", "plateau_steps", "signal_draws", "trace_every")
        check_counts(self, *counts, "scan_keys")


class ConvergenceLab(Lab[ConvergenceConfig, TableCase]):
    """Tables "runs", "traces", "plateau", "agreement", "hessian", "spectra" and "codes".

    What their rows hold is said by `run`, `plateau`, `agreement`, `scan` and `second_code`. Running
    raises ``InputError`` as `model_heads` and `model_sets` do.
    """

    def cases(self) -> list[TableCase]:
        """List the cases that are measured."""
        config = self.config
        arguments = {
            "runs": itertools.product(self.sets, SOLVERS),
            "noise": zip(self.noise_sets),
            "plateau": itertools.product(config.plateau_dims, config.plateau_seeds, SOLVERS),
            "agreement": zip(config.signal_dims),
            "hessian": itertools.product(range(len(self.points)), config.temperatures),
        }
        return [TableCase(table, given) for table, each in arguments.items() for given in each]

    def measure(self, case: TableCase) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        return getattr(self, case.table)(*case.arguments)

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        return {**tables, "codes": second_code(self.points)}

    def runs(self, name: str, solver: Solver) -> Tables:
        """Run a solver on planted or on a model's keys."""
        summary, trace = run(self.sets[name], solver, self.config)
        return {"runs": [summary], "traces": trace}

    def noise(self, name: str) -> Tables:
        """Run the paper's solver on noise."""
        summary, _ = run(self.noise_sets[name], "gradient", self.config)
        return {"runs": [summary]}

    def plateau(self, d: int, seed: int, solver: Solver) -> Tables:
        """Time how long a solver waits at the start."""
        return {"plateau": [plateau(d, seed, solver, self.config)]}

    def agreement(self, d: int) -> Tables:
        """Compare first gradients."""
        return {"agreement": [agreement(d, self.config)]}

    def hessian(self, point: int, temperature: float) -> Tables:
        """Take the Hessian at a point."""
        summary, spectrum = scan(self.points[point], temperature)
        return {"hessian": [summary], "spectra": spectrum}

    @cached_property
    def heads(self) -> list[KeySet]:
        """Keys of the model's heads."""
        return model_heads(self.loaded, self.text, self.config)

    @cached_property
    def sets(self) -> dict[str, KeySet]:
        """Planted keys and the model's, by name."""
        sets = [*planted_sets(self.config), *model_sets(self.heads, self.config)]
        return {keys.name: keys for keys in sets}

    @cached_property
    def noise_sets(self) -> dict[str, KeySet]:
        """Gaussian keys, by name."""
        return {keys.name: keys for keys in noise_sets(self.config)}

    @cached_property
    def points(self) -> list[ScanPoint]:
        """Rotations at which the Hessian is taken."""
        return scan_points(self.heads, self.config)


def planted_sets(config: ConvergenceConfig) -> list[KeySet]:
    """Make planted keys of every size asked for."""
    return [
        _renamed(synthetic.planted_keys(d, n, config.seed), f"planted, d = {d}, N = {n}")
        for d, n in config.planted
    ]


def noise_sets(config: ConvergenceConfig) -> list[KeySet]:
    """Make Gaussian keys of every size asked for."""
    return [synthetic.noise_keys(d, n, config.seed) for d, n in sorted(set(config.noise))]


def model_heads(loaded: LoadedModel, text: Text, config: ConvergenceConfig) -> list[KeySet]:
    """Capture every head of the layers, ``scan_keys`` keys each, calibration mean taken off."""
    chosen = solvers.SolverConfig(
        n_keys=config.scan_keys,
        windows=config.windows,
        layers=config.layers,
        centerings=("token_mean",),
        seed=config.seed,
    )
    return solvers.head_keys(loaded, text, chosen)


def model_sets(heads: Sequence[KeySet], config: ConvergenceConfig) -> list[KeySet]:
    """Lay heads of a layer side by side, as the paper counts its dimensions.

    ``heads``: what `model_heads` gave, layer after layer. Raises ``InputError`` if a layer has
    fewer heads than are asked for.
    """
    n_heads = len(heads) // len(config.layers)
    sets = []
    for place, layer in enumerate(config.layers):
        of_layer = heads[place * n_heads : (place + 1) * n_heads]
        for width, n_keys in config.model:
            if width > n_heads:
                raise InputError(f"model asks for {width} heads: a layer has {n_heads}")
            keys, held_out = (
                _evenly(torch.cat([getattr(head, part) for head in of_layer[:width]], dim=1), n)
                for part, n in (("keys", n_keys), ("held_out", 8192))
            )
            plural = "head" if width == 1 else "heads"
            name = f"layer {layer}, {width} {plural}, N = {n_keys}"
            sets.append(KeySet(name, f"layer {layer}", keys, held_out))
    return sets


# How long it takes.


def run(keys: KeySet, solver: Solver, config: ConvergenceConfig) -> tuple[Row, list[Row]]:
    """Run a solver on a set of keys, from an SRHT: what came of it, and its thinned trace.

    The first row has beta in sample and held out at the paper's marks and at the end, and the first
    traced step at which the solver had done something: ``to_left`` the plateau, ``to_target`` and
    ``to_late_target`` in sample, ``to_target_held_out``, and ``to_99``, 99 % of its lift in sample.
    None where it never did.
    """
    learn = LearnConfig(solver=solver, seed=config.seed, trace_every=config.trace_every)
    learned = _learned(keys, learn)
    last = learned.trace[-1]
    trace = [
        {
            "keys": keys.name,
            "solver": solver,
            "step": point.step,
            "train_beta": point.train_beta,
            "held_out_beta": point.held_out_beta,
        }
        for point in learned.trace
        if point.step in _KEPT or point is last
    ]
    return _summary(keys, solver, learned), trace


def first_step(trace: Sequence[TracePoint], target: float, which: str = "train_beta") -> int | None:
    """Find the first traced step whose beta is ``target`` or more; None if there is none."""
    return next((point.step for point in trace if getattr(point, which) >= target), None)


def plateau(d: int, seed: int, solver: Solver, config: ConvergenceConfig) -> Row:
    """Count steps until the held-out beta of planted keys leaves the floor, and until the target.

    A run ends at the target; one that has not left after ``plateau_steps`` has None there.
    """
    keys = synthetic.planted_keys(d, config.keys_per_dim * d, seed)
    learn = LearnConfig(
        solver=solver,
        seed=seed,
        steps=None if solver == "annealed" else config.plateau_steps,
        tolerance=0.0,
        trace_every=config.trace_every,
    )
    trace = _until_target(keys, learn)
    return {
        "d": d,
        "n_keys": len(keys.keys),
        "seed": seed,
        "solver": solver,
        "to_left": first_step(trace, haar_beta(d) + LEFT, "held_out_beta"),
        "to_target": first_step(trace, TARGET, "held_out_beta"),
        "steps": trace[-1].step,
    }


def median_steps(rows: Sequence[Row], column: str) -> float | None:
    """Take the median of a column of steps, in which None is later than any number."""
    steps = sorted(math.inf if row[column] is None else row[column] for row in rows)
    middle = (steps[(len(steps) - 1) // 2] + steps[len(steps) // 2]) / 2
    return None if math.isinf(middle) else middle


def agreement(d: int, config: ConvergenceConfig) -> Row:
    """Compare the first gradients of two sets of planted keys, at random rotations.

    ``cosine`` is that of the two gradients, the mean of ``signal_draws`` rotations; ``error`` its
    standard error; ``expected`` is `expected_agreement`.
    """
    n_keys = config.keys_per_dim * d
    keys = synthetic.planted_keys(d, n_keys, config.seed)
    draws = []
    for draw in range(config.signal_draws):
        start = fixed.haar(d, config.seed + 100 + draw)
        one, other = (slope(part, start) for part in (keys.keys, keys.held_out))
        draws.append((one * other).sum() / (one.norm() * other.norm()))
    cosines = torch.stack(draws).double()
    return {
        "d": d,
        "n_keys": n_keys,
        "cosine": cosines.mean().item(),
        "error": cosines.std().item() / math.sqrt(len(cosines)),
        "expected": expected_agreement(d, n_keys),
    }


def expected_agreement(d: int, n_keys: int, noise: float = PLANTED_NOISE) -> float:
    """Expect a cosine of the gradients of two sets of planted keys at a random rotation.

    To leading order in 1/d. A coordinate is a sum of many bits, hence Gaussian but for a fourth
    cumulant, so that beta is ``sqrt(2/pi) (1 + rho mean_i sum_j O_ij^4 / 12)`` for the overlaps O
    of the axes with those of the lattice and rho = 1/(1 + noise^2)^2. Its slope has the rms
    ``sqrt(2/(3 pi)) rho / d`` over random O; sampling adds ``sqrt((1/2 - 1/pi) d / N)``.
    """
    signal = GAUSSIAN_BETA * d**-1.0 / math.sqrt(3) / (1 + noise**2) ** 2
    sampling = (0.5 - 1 / math.pi) * d / n_keys
    return signal**2 / (signal**2 + sampling)


# Near the lattice.


def along_a_geodesic(
    d: int, n_keys: int, noises: Sequence[float], angles: Sequence[float], seed: int = 0
) -> list[Row]:
    """Rotate planted keys away from their lattice, in one random direction, by rms ``angles``.

    A row per noise and angle: ``loss`` is how far beta fell, ``flipped`` the share of signs that
    are no longer those at angle zero. Computed in fp64.
    """
    direction = random_direction(d, seed + 2)
    rows: list[Row] = []
    for noise in noises:
        keys = synthetic.planted_keys(d, n_keys, seed, noise)
        lattice = (keys.keys @ fixed.haar(d, seed + 1).T).double()
        best = beta(lattice)
        for angle in angles:
            turned = lattice @ torch.matrix_exp(angle * direction).T
            flipped = ((turned >= 0) != (lattice >= 0)).double().mean().item()
            rows.append(
                {
                    "noise": noise,
                    "angle": float(angle),
                    "loss": best - beta(turned),
                    "flipped": flipped,
                }
            )
    return rows


def home(
    d: int, n_keys: int, angle: float, solver: Solver, *, noise: float = 0.0, steps: int = 60
) -> list[float]:
    """Measure what beta lacks after each step of a solver that starts ``angle`` off the lattice.

    For planted keys, in sample, in fp64: lacking to one without noise, and with noise to where ITQ
    settles from the lattice itself.
    """
    keys = synthetic.planted_keys(d, n_keys, 0, noise)
    lattice = keys.keys.double() @ fixed.haar(d, 1).double().T
    away = torch.matrix_exp(angle * random_direction(d, 7))
    best = max(_way(lattice, "itq", 60)) if noise else 1.0
    return [best - value for value in _way(lattice @ away.T, solver, steps)]


def steps_below(gaps: Sequence[float], tolerances: Sequence[float]) -> list[int | None]:
    """Find for each tolerance the first step whose gap is below it; None if there is none."""
    return [next((i for i, gap in enumerate(gaps) if gap < t), None) for t in tolerances]


# The Hessian.


@dataclass(frozen=True, eq=False)
class ScanPoint:
    """A rotation at which the Hessian of the mean cosine of ``keys.held_out`` is taken."""

    name: str
    keys: KeySet
    rotation: Tensor


def scan_points(heads: Sequence[KeySet], config: ConvergenceConfig) -> list[ScanPoint]:
    """List where the Hessian is taken: noise, a lattice without and with noise, a model's heads.

    Of every layer the first head. Rotations are learned from calibration keys; the Hessian is that
    of the others.
    """
    d, seed = config.scan_dim, config.seed
    null = synthetic.noise_keys(d, config.scan_keys, seed)
    null = replace(null, name="noise", held_out=null.keys)
    perfect = _renamed(synthetic.planted_keys(d, config.scan_keys, seed, 0.0), "perfect lattice")
    planted = _renamed(synthetic.planted_keys(d, config.scan_keys, seed), "planted")
    best = fixed.haar(d, seed + 1)
    away = random_direction(d, seed + 2, dtype=torch.float32)
    points = [
        ScanPoint("any rotation", null, fixed.identity(d)),
        ScanPoint("lattice", perfect, best),
        ScanPoint("lattice", planted, best),
        ScanPoint("0.8 rad off", planted, geodesic(best, away, 0.8)),
        ScanPoint("Haar", planted, fixed.haar(d, seed + 77)),
        ScanPoint("planes turned by 45°", planted, quarter_turns(d) @ best),
    ]
    n_heads = len(heads) // len(config.layers)
    for place, layer in enumerate(config.layers):
        keys = _renamed(heads[place * n_heads], f"layer {layer}, head 0")
        size = keys.keys.shape[1]
        learned = _learned(keys, LearnConfig(seed=seed, trace_every=10**6)).matrix
        points += [
            ScanPoint("identity", keys, fixed.identity(size)),
            ScanPoint("SRHT", keys, fixed.srht(size, seed)),
            ScanPoint("learned", keys, learned),
        ]
    return points


def quarter_turns(d: int) -> Tensor:
    """Make the rotation [d, d] of each pair of axes by 45 degrees: corners become spikes."""
    eighth = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)
    return torch.block_diag(*[eighth] * (d // 2))


def scan(point: ScanPoint, temperature: float) -> tuple[Row, list[Row]]:
    """Take the spectrum of the Hessian at a point: a row of all, and a row per group.

    The d(d-1)/2 eigenvectors are those of one half of the keys; what counts is the curvature of
    the other half along them, since eigenvalues spread by sampling alone. ``lowest`` and
    ``highest`` are that curvature averaged over the outermost hundredth of the directions at either
    end, ``lowest_in_sample`` and ``highest_in_sample`` the extreme eigenvalues themselves,
    ``positive`` and ``negative`` count directions by the other half's sign. ``slope`` is the norm
    of the gradient in the same units. The rows of the second table are means over groups of equal
    size.
    """
    keys, rotation = point.keys.held_out, point.rotation
    ours, others = (hessian(half, rotation, temperature) for half in (keys[::2], keys[1::2]))
    values, directions = torch.linalg.eigh(ours)
    judged = (directions * (others @ directions)).sum(0)
    outermost = max(1, len(values) // 100)
    steepness = slope(keys, rotation, temperature).norm().item()
    at = {"keys": point.keys.name, "point": point.name, "temperature": temperature}
    summary = at | {
        "d": len(rotation),
        "n_keys": len(keys),
        "beta": beta(keys @ rotation.T),
        "slope": steepness * math.sqrt(len(rotation)),
        "lowest": judged[:outermost].mean().item(),
        "mean": judged.mean().item(),
        "highest": judged[-outermost:].mean().item(),
        "lowest_in_sample": values[0].item(),
        "highest_in_sample": values[-1].item(),
        "negative": int((judged < 0).sum()),
        "positive": int((judged > 0).sum()),
    }
    groups = zip(values.tensor_split(_RANKS), judged.tensor_split(_RANKS), strict=True)
    spectrum = [
        at
        | {
            "rank": (group + 0.5) / _RANKS,
            "in_sample": in_sample.mean().item(),
            "held_out": held_out.mean().item(),
        }
        for group, (in_sample, held_out) in enumerate(groups)
    ]
    return summary, spectrum


# A second code.


def code_errors(y: Tensor, n_codes: int = 2) -> list[float]:
    """Measure the share of energy that is left after 1, 2, … sign codes, mean over vectors.

    Each code is of what the codes before have left, with the scale of least error, the mean
    absolute coordinate. ``y`` [N, d], rotated keys. Raises ``InputError`` as ``beta.cosine`` does,
    and so on keys of which nothing is left for the next code.
    """
    share = torch.ones(len(y), dtype=torch.float64)
    errors = []
    for _ in range(n_codes):
        share = share * (1 - cosine(y).double().square())
        errors.append(share.mean().item())
        signs = torch.where(y >= 0, 1.0, -1.0).to(y)
        y = y - y.abs().mean(-1, keepdim=True) * signs
    return errors


def second_code(points: Sequence[ScanPoint]) -> list[Row]:
    """Measure one and two sign codes on held-out keys, at every point that leaves an error.

    ``beta_needed`` is the beta with which one code would have the error of the two.
    """
    rows: list[Row] = []
    for point in points:
        y = point.keys.held_out @ point.rotation.T
        if (achieved := beta(y)) < 1 - 1e-6:
            one, two = code_errors(y)
            rows.append(
                {
                    "keys": point.keys.name,
                    "point": point.name,
                    "beta": achieved,
                    "one": one,
                    "two": two,
                    "beta_needed": math.sqrt(1 - two),
                }
            )
    return rows


def _summary(keys: KeySet, solver: Solver, learned: LearnedRotation) -> Row:
    trace = learned.trace
    start, d = trace[0].train_beta, keys.keys.shape[1]
    lift = learned.train_beta - start
    to_99 = first_step(trace, start + 0.99 * lift) if lift > LEFT else None
    at = {point.step: point for point in trace}
    marks = {
        f"{name}_{step}": getattr(at[step], f"{name}_beta") if step in at else None
        for step in MARKS
        for name in ("train", "held_out")
    }
    return {
        "keys": keys.name,
        "kind": keys.kind,
        "d": d,
        "n_keys": len(keys.keys),
        "keys_per_dim": len(keys.keys) / d,
        "solver": solver,
        "optimum": keys.optimum,
        "start": start,
        **marks,
        "train": learned.train_beta,
        "held_out": learned.held_out_beta,
        "steps": trace[-1].step,
        "seconds": learned.seconds,
        "to_left": first_step(trace, haar_beta(d) + LEFT, "held_out_beta"),
        "to_target": first_step(trace, TARGET),
        "to_late_target": first_step(trace, LATE_TARGET),
        "to_target_held_out": first_step(trace, TARGET, "held_out_beta"),
        "to_99": to_99,
        "seconds_to_99": None if to_99 is None else at[to_99].seconds,
    }


def _way(keys: Tensor, solver: Solver, steps: int) -> list[float]:
    """Beta in sample after every step from the identity."""
    learn = LearnConfig(
        solver=solver, initial="identity", steps=steps, tolerance=0.0, trace_every=1
    )
    trace = _learned(KeySet("", "planted", keys, keys[:1]), learn).trace
    return [point.train_beta for point in trace]


class _Reached(Exception):
    """Ends a run whose target is reached."""


def _until_target(keys: KeySet, learn: LearnConfig) -> list[TracePoint]:
    trace: list[TracePoint] = []

    def follow(point: TracePoint) -> None:
        trace.append(point)
        assert point.held_out_beta is not None  # the set has held-out keys
        if point.held_out_beta >= TARGET:
            raise _Reached

    try:
        _learned(replace(keys, held_out=keys.held_out[:4096]), learn, follow)
    except _Reached:
        pass
    return trace


def _learned(
    keys: KeySet, learn: LearnConfig, progress: ProgressReport | None = None
) -> LearnedRotation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # that is what is measured
        return learn_rotation(keys.keys, learn, held_out=keys.held_out, progress=progress)


def _evenly(keys: Tensor, n: int) -> Tensor:
    """At most ``n`` keys, from all over the text."""
    return keys[:: max(1, len(keys) // n)][:n].contiguous()


def _renamed(keys: KeySet, name: str) -> KeySet:
    return replace(keys, name=name)
