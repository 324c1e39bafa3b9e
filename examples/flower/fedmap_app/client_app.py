"""What a node runs for each message."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmap_app import task
from fedmap_sparse.engines.flower import ContextState, FileState, fedmap_evaluate, fedmap_train

app = ClientApp()


def setting(context: Context):
    """(this node's part of the data, the number of parts, a client, where its state is kept)."""
    config = context.run_config
    folder = config["state-folder"]
    return (
        int(context.node_config["partition-id"]),
        int(config["clients"]),
        task.make_client(config["dtype"]),
        FileState(folder) if folder else ContextState(),
    )


@app.train()
def train(message: Message, context: Context) -> Message:
    part, clients, client, state = setting(context)
    return fedmap_train(
        message, context, client, lambda c, m: task.train(part, clients, c, m), state=state
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    part, clients, client, state = setting(context)
    return fedmap_evaluate(
        message, context, client, lambda c, _: task.evaluate(part, clients, c), state=state
    )
