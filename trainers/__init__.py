"""Trainers: modules with `prepare` and `run`. A config is read into records before they see it."""
