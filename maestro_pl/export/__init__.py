"""What a run has learned, in the formats of PEFT and transformers: adapters, or adapters merged into the base.

Read `trained_run.py` (which run), `base.py` (which base), `plan.py` (what becomes of each tensor), `merged.py` and
`adapter.py` (writing), `check.py` (is it the same), in this order; `steps.py` calls them.
"""

from maestro_pl.export.steps import Request, export_run

__all__ = ["Request", "export_run"]
