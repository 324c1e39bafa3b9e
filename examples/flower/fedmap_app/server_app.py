"""What the SuperLink runs."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmap_app import task
from fedmap_sparse.engines.flower import FedMap

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    server = task.make_server(int(config["clients"]))
    strategy = FedMap(
        server,
        fraction_evaluate=float(config["evaluate"]),
        min_nodes=int(config["clients"]),
        order="partition-id",  # the same bits whatever ids the nodes get
        checkpoint=config["checkpoint"] or None,
        timeout=float(config["timeout"]),
    )
    rounds = int(config["rounds"]) - server.round
    strategy.start(grid, strategy.arrays, num_rounds=rounds, timeout=float(config["timeout"]))
    print(f"round {server.round}: {server.params}")
