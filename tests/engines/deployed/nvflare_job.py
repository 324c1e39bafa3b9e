"""Somebody's NVFlare job, plain or with the codec's filters: WORKSPACE plain|coded.

The same file is the site's script, which knows nothing of this package.
"""

import sys
from pathlib import Path

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10))
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() == 2:
                    p[torch.rand_like(p) < 0.9] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def site() -> None:
    import nvflare.client as flare

    torch.set_num_threads(1)
    flare.init()
    part = int(flare.get_site_name().split("-")[1])
    model = Net()
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict({k: torch.as_tensor(v) for k, v in received.params.items()})
        kept = [p != 0 for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        rng = torch.Generator().manual_seed(100 * received.current_round + part)
        x, y = torch.randn(64, 100, generator=rng), torch.randint(10, (64,), generator=rng)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for p, k in zip(model.parameters(), kept):
                if p.dim() == 2:
                    p[~k] = 0.0
        meta = {"NUM_STEPS_CURRENT_ROUND": part}
        flare.send(flare.FLModel(params=model.state_dict(), meta=meta))


def job(workspace: Path, coded: bool) -> None:
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe.sim_env import SimEnv
    from nvflare_job import Net as named  # NVFlare's JSON has to name its module

    from fedmap_sparse.engines.nvflare import FedMapDecoder, FedMapEncoder

    recipe = FedAvgRecipe(
        name="job",
        model=named(),
        min_clients=2,
        num_rounds=2,
        train_script=Path(__file__).name,
    )
    if coded:
        recipe.add_server_output_filter(FedMapEncoder(), tasks=["train"])
        recipe.add_client_input_filter(FedMapDecoder(), tasks=["train"])
        recipe.add_client_output_filter(FedMapEncoder(), tasks=["train"])
        recipe.add_server_input_filter(FedMapDecoder(), tasks=["train"])
    run = recipe.execute(SimEnv(num_clients=2, num_threads=2, workspace_root=str(workspace)))
    print("result", run.get_result())


if __name__ == "__main__":
    if len(sys.argv) == 3:
        job(Path(sys.argv[1]), sys.argv[2] == "coded")
    else:
        site()
