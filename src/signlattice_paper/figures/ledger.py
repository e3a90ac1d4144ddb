"""Figure of the ledger: how many claims came to which verdict."""

from __future__ import annotations

from collections.abc import Iterable

from signlattice_paper.claims import GROUPS, Claim, grouped
from signlattice_paper.figures.style import COLOURS, Figure, styled

_COLOURS = dict(zip(GROUPS, ("green", "vermilion", "purple", "grey"), strict=True))


@styled
def fig_verdicts(claims: Iterable[Claim]) -> Figure:
    """Draw a bar for each verdict that was reached, by group; hatched where it is provisional.

    The group is written beside its bars, so that nothing rests on the colour alone.
    """
    claims = list(claims)
    figure = Figure(figsize=(6.4, 4.6))
    axes = figure.subplots()
    places, names, y = [], [], 0.0
    for group, verdicts in GROUPS.items():
        found = grouped(claims, group)
        reached = [v for v in verdicts if any(claim.verdict == v for claim in found)]
        if not reached:
            continue
        axes.text(0, y, f"{group}: {len(found)}", weight="bold", va="center", fontsize=10)
        for verdict in reached:
            y += 1
            of_it = [claim for claim in found if claim.verdict == verdict]
            _bar(axes, y, of_it, COLOURS[_COLOURS[group]])
            places.append(y)
            names.append(verdict)
        y += 1.15
    axes.set_yticks(places, names)
    axes.set_xlim(0, 1.08 * axes.get_xlim()[1])
    axes.set_ylim(y - 0.5, -0.6)
    open_ = any(claim.status == "open" for claim in claims)
    axes.set_xlabel(f"claims, of {len(claims)}" + (" (hatched: provisional)" if open_ else ""))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _bar(axes, y: float, claims: list[Claim], colour: str) -> None:
    settled = sum(claim.status == "settled" for claim in claims)
    axes.barh(y, settled, height=0.72, color=colour)
    axes.barh(
        y,
        len(claims) - settled,
        left=settled,
        height=0.72,
        color="white",
        edgecolor=colour,
        hatch="////",
        linewidth=1,
    )
    axes.text(len(claims) + 0.15, y, str(len(claims)), va="center", fontsize=10)
