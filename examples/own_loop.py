"""Your own training loop, sparse: flatten the model, prune between epochs, step the survivors.

The loop is plain PyTorch; three lines are this package's. Run it: `python examples/own_loop.py`
(a few seconds).
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedmap_sparse as fs
from fedmap_sparse.experiments.data import load

torch.manual_seed(0)
data = load("fashion-mnist-subset")
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))

params = fs.flatten(model)  # one buffer; `model` is used as before
schedule = fs.schedule.Iterative(target=0.95, start=1, end=4)
optimizer = fs.optim.MaskedSGD(params, lr=0.1, momentum=0.9)

for epoch in range(6):
    keep = schedule.keep(epoch, params.layout.eligible)
    if keep < params.mask.nnz:
        # Exactly `keep` of the largest survive, over all layers; momentum follows at the next step.
        params.mask = fs.ops.prune_(params.prunable, keep, within=params.mask)

    for chosen in torch.randperm(len(data.train)).split(128):
        optimizer.zero_grad()
        cross_entropy(model(data.train.images[chosen]), data.train.labels[chosen]).backward()
        optimizer.step()  # pruned weights stay exactly 0

    with torch.no_grad():
        right = (model(data.validation.images).argmax(1) == data.validation.labels).float().mean()
    print(f"epoch {epoch}: density {params.density:.2%}, validation accuracy {right:.1%}")

state = params.to_state_dict()  # dense, for any other tool
zeros = sum(int((t == 0).sum()) for t in state.values() if t.dim() == 2)
assert params.mask.nnz == fs.schedule.keep_count(params.layout.eligible, 0.95)
assert zeros >= params.layout.eligible - params.mask.nnz
print(f"{params.mask.nnz:,} of {params.layout.eligible:,} weights left")
