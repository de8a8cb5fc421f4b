"""Trainers: modules with `run(config, workdir, ...)`, the only readers of configs."""
