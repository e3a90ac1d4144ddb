"""Explorers: what a reader can move, in the built page without a kernel and live in Jupyter.

One module per thing to explore. Those of discrete frames stand on ``frames``.
"""

from __future__ import annotations
