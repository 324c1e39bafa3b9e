"""The ops: contract, plain-torch reference, public function and registration, one file each."""

from fedmap_sparse.ops.accumulate import Accumulator, weighted_mean
from fedmap_sparse.ops.clip import clip_difference_
from fedmap_sparse.ops.distances import squared_distances
from fedmap_sparse.ops.extract import deposit, extract
from fedmap_sparse.ops.fixed import from_fixed, to_fixed
from fedmap_sparse.ops.masked_adamw import masked_adamw_
from fedmap_sparse.ops.masked_sgd import masked_sgd_
from fedmap_sparse.ops.noise import add_gaussian_
from fedmap_sparse.ops.pack import pack, unpack
from fedmap_sparse.ops.quantize import all_finite, cast, dequantize_int8, quantize_int8
from fedmap_sparse.ops.select import magnitude_mask, magnitude_threshold, prune_, zero_pruned_
from fedmap_sparse.ops.trimmed import trimmed_mean

__all__ = [
    "Accumulator",
    "add_gaussian_",
    "all_finite",
    "cast",
    "clip_difference_",
    "deposit",
    "dequantize_int8",
    "extract",
    "from_fixed",
    "magnitude_mask",
    "magnitude_threshold",
    "masked_adamw_",
    "masked_sgd_",
    "pack",
    "prune_",
    "quantize_int8",
    "squared_distances",
    "to_fixed",
    "trimmed_mean",
    "unpack",
    "weighted_mean",
    "zero_pruned_",
]
