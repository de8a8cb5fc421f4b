"""The report of a run: one HTML page that needs nothing but a browser."""

from umd.report.read import DEFAULTS, FINISHED, Run, Series, add_stages, read_run
from umd.report.writer import FILE, Reporter, write_overview, write_run

__all__ = [
  "DEFAULTS",
  "FILE",
  "FINISHED",
  "Reporter",
  "Run",
  "Series",
  "add_stages",
  "read_run",
  "write_overview",
  "write_run",
]
