"""Optimizers whose state exists for survivors only: torch.optim's arithmetic, one call per step."""

from fedmap_sparse.optim.adamw import MaskedAdamW
from fedmap_sparse.optim.optimizer import MaskedOptimizer
from fedmap_sparse.optim.sgd import MaskedSGD

__all__ = ["MaskedAdamW", "MaskedOptimizer", "MaskedSGD"]
