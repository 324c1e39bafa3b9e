"""FedMap as an NVFlare job, in its simulator: `python examples/nvflare/job.py [WORKSPACE]`.

Needs `pip install fedmap-sparse[nvflare]`. `job.export_job(...)` gives the same for a deployment.
"""

import os
import sys
from pathlib import Path

from nvflare.client.config import ExchangeFormat
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner

HERE = Path(__file__).parent
# The simulator's processes import the example's modules.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
sys.path.insert(0, str(HERE))
os.chdir(HERE)  # where the script of the job is found

import task  # noqa: E402  # after the path is set

from fedmap_sparse.engines.nvflare import FedMapController  # noqa: E402  # after the path is set

workspace = Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/fedmap_nvflare").resolve()
workspace.mkdir(parents=True, exist_ok=True)
job = FedJob(name="fedmap", min_clients=task.CLIENTS)
job.set_app_packages(["fedmap_sparse"])  # installed: not to be copied into the job
job.to_server(
    FedMapController(
        server="task:make_server",
        num_rounds=task.ROUNDS,
        num_clients=task.CLIENTS,
        checkpoint=str(workspace / "server.state"),
    )
)
for site in range(1, task.CLIENTS + 1):
    runner = ScriptRunner(
        script="client.py",
        framework=FrameworkType.RAW,
        server_expected_format=ExchangeFormat.RAW,
    )
    job.to(runner, f"site-{site}")
job.simulator_run(str(workspace / "simulator"), threads=task.CLIENTS)

server = task.make_server()
server.from_bytes((workspace / "server.state").read_bytes())
print(f"round {server.round}: density {server.params.density:.2f}")
