"""``python -m signlattice_paper``: the paper's command line, as ``signlattice-paper`` is."""

from __future__ import annotations

import sys

from signlattice_paper.cli import main

if __name__ == "__main__":
    sys.exit(main())
