"""Uses an installed fedmap_sparse as a stranger would: run it where the package is installed."""

import torch

import fedmap_sparse as fs
from fedmap_sparse.experiments import data, models, partition

model = models.build("mlp", (1, 28, 28), 10)
params = fs.flatten(model)
eligible = params.layout.initial_mask()
masks = [
    fs.ops.magnitude_mask(params.prunable, eligible.nnz // 10, within=eligible, backend=backend)
    for backend in ("reference", "cpu")
]
assert masks[0] == masks[1]
assert masks[0].nnz == eligible.nnz // 10
packed = fs.ops.pack(params.prunable, masks[1])
assert packed.numel() == masks[1].nnz
message = fs.encode(params, masks[1], mask_section="full")
assert torch.equal(fs.decode(message, params.layout).packed, packed)
loaded = data.load()
assert len(partition.iid(loaded.train.labels, 10)) == 10
print(f"fedmap_sparse {fs.__version__} at {fs.__file__}: {len(loaded.train)} training images")
