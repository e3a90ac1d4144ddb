"""The solver bars: held-out beta and wall time of the default solver, from an SRHT start.

Planted sign-lattice keys (±1 + .48 · noise, rotated) at three sizes, and the mini's own keys, where
the default must not fall behind ITQ. Prints a table, writes ``results/bench_solvers/<model>.json``
and exits with 1 if a bar is missed. Times are of the machine at hand: run it when it is quiet.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from signlattice.data.texts import read_text
from signlattice.errors import InputError
from signlattice.models import loading
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.fixed import orthogonality_defect
from signlattice.rotations.learned import learn_rotation
from signlattice.rotations.synthetic import planted_keys
from signlattice_paper import records
from signlattice_paper.experiments.solvers import SolverConfig, bar_row, head_keys
from signlattice_paper.records import Metric, Row

PLANTED = ((64, 8192, 0.900, 3.0), (128, 16384, 0.905, 10.0), (256, 49152, 0.905, 90.0))
"""Head size, keys, least held-out beta, most seconds."""

BEHIND = 0.001
"""How far below ITQ the default may end on a head's real keys."""

SLOWER = 2.0
"""In how many times ITQ's time, on any head."""

DEFECT = 1e-5


def planted_rows(seeds: int) -> list[Row]:
    """Solve each planted size with each seed: beta, seconds, and whether both are enough."""
    rows: list[Row] = []
    for d, n_keys, least, most in PLANTED:
        for seed in range(seeds):
            keys = planted_keys(d, n_keys, seed)
            learned = learn_rotation(keys.keys, LearnConfig(seed=seed), held_out=keys.held_out)
            defect = orthogonality_defect(learned.matrix)
            beta, seconds = learned.held_out_beta, learned.seconds
            met = beta >= least and seconds <= most and defect <= DEFECT
            rows.append(
                {
                    "d": d,
                    "n_keys": n_keys,
                    "seed": seed,
                    "held_out_beta": beta,
                    "optimum": keys.optimum,
                    "least": least,
                    "seconds": seconds,
                    "most": most,
                    "defect": defect,
                    "met": met,
                }
            )
            print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items() if k != "met"), met)
    return rows


def main() -> int:
    """Run both bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="olmoe-mini", help="whose keys ITQ is compared on")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each planted size")
    options = parser.parse_args()
    try:
        loaded = loading.load_model(options.model)
        n_layers = loaded.model.config.get_text_config(decoder=True).num_hidden_layers
        config = SolverConfig(layers=tuple(range(n_layers)))
        run = records.begin(
            "bench_solvers",
            options.model,
            config=config,
            seeds=tuple(range(options.seeds)),
            weights_hash=loaded.weights_hash,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    planted = planted_rows(options.seeds)
    heads = head_keys(loaded, read_text("corpus"), config)
    real = [bar_row(keys, config) for keys in tqdm(heads, desc="real keys")]
    worst = min(row["difference"] for row in real)
    slowest = max(row["time_ratio"] for row in real)
    ratio = sum(row["annealed_seconds"] for row in real) / sum(row["itq_seconds"] for row in real)
    print(f"real keys, {len(real)} sets: worst difference to ITQ {worst:+.4f}")
    print(f"time in units of ITQ's: {ratio:.2f} in all, {slowest:.2f} at worst")
    metrics = {
        "planted": planted,
        "real": real,
        "worst_difference": Metric(worst, n=len(real)),
        "time_ratio": Metric(ratio, n=len(real)),
        "worst_time_ratio": Metric(slowest, n=len(real)),
    }
    print(run.finish(metrics).save())
    met = all(row["met"] for row in planted) and worst >= -BEHIND and slowest <= SLOWER
    print("all bars met" if met else "a bar is missed")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
