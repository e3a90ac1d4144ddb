"""Figures: each function takes records or numbers and gives a matplotlib figure, nothing else.

One module per theme, one style for all: colours that the colour-blind can tell apart (Okabe and
Ito), axes labelled with units, and a white ground that stays readable on a dark page.
"""

from __future__ import annotations

from signlattice_paper.figures.style import COLOURS, styled

__all__ = ["COLOURS", "styled"]
