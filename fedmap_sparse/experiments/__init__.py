"""Experiments over the library: data, partition, models, runner, report."""
