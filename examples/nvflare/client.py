"""What each site runs: NVFlare's Client API, and one call of fedmap_sparse per round."""

import nvflare.client as flare
import task
import torch

from fedmap_sparse.engines.nvflare import fedmap_answer

torch.set_num_threads(1)
flare.init()
part = int(flare.get_site_name().split("-")[1]) - 1  # site-1 has part 0
client = task.make_client()
while flare.is_running():
    model = flare.receive()
    flare.send(fedmap_answer(model, client, lambda c, message: task.train(part, c, message)))
