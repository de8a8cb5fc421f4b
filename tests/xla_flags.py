"""XLA's flags for tests, which compile for longer than they run; conftest imports it before JAX."""

from importlib.metadata import version

QUICK = "--xla_backend_optimization_level=0"
# XLA aborts at a flag that it does not know.
if version("jaxlib").startswith("0.10."):
  QUICK += " --xla_cpu_use_fusion_emitters=false"
