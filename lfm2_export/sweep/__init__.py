"""``lfm2-export sweep``: many exports by one plan, measured and held against gates, on this machine or a cluster.

In: a plan (YAML): checkpoints, backends, schemes, variants, gates. Out: an artifact for each cell in the plan's output
folder, a ``SweepReport`` beside them as JSON and as a page. A sweep that was ended goes on where it was.

``document.py`` reads YAML with its lines, ``plan.py`` what it means, ``cells.py`` which cells that makes, ``jobs.py``
what each needs and follows from, ``schedule.py`` what is next, ``work.py`` does it, ``on_ray.py`` sends it to workers.
"""

from __future__ import annotations

from lfm2_export.sweep.report import SweepReport
from lfm2_export.sweep.run import Sweep, sweep

__all__ = ["Sweep", "SweepReport", "sweep"]
