"""A run's report: a page that needs nothing but a browser."""

from umd.report.read import DEFAULTS, FINISHED, add_stages
from umd.report.writer import FILE, Reporter, write_overview, write_run

__all__ = [
  "DEFAULTS",
  "FILE",
  "FINISHED",
  "Reporter",
  "add_stages",
  "write_overview",
  "write_run",
]
