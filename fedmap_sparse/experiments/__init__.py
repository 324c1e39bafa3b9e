"""Experiments over the library: data, partition, models, runner, report.

    from fedmap_sparse.experiments import Config, run

    summary = run(Config(rounds=10, partition="dirichlet", alpha=0.3))

Beyond the package's own dependencies this wants the extra `experiments`.
"""

from fedmap_sparse.errors import ConfigError, DataError
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.data import Dataset, Split
from fedmap_sparse.experiments.progress import Observer
from fedmap_sparse.experiments.runner import run

__all__ = ["Config", "ConfigError", "DataError", "Dataset", "Observer", "Split", "run"]
