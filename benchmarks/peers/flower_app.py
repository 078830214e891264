"""A plain Flower app, as Flower's PyTorch quickstart writes it: FedAvg of `flwr.serverapp`, a ClientApp that trains and evaluates.

`benchmarks.peers.flower_run` copies this file into the app's folder and submits it with `flwr run`. The run config names the folders.
"""

from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.peers.work import Work, evaluate, finish, first_network, load_state, note_bytes, state_of, train

client_app = ClientApp()
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs FedAvg over all hospitals, then judges the result on the test set."""
    work, turn = _places(context)
    network, hospitals = first_network(work.recipe), len(work.hospitals)
    strategy = FedAvg(min_train_nodes=hospitals, min_evaluate_nodes=hospitals, min_available_nodes=hospitals)
    result = strategy.start(grid, ArrayRecord(state_of(network)), work.recipe.rounds)
    load_state(network, result.arrays.to_torch_state_dict())
    finish(work, network, turn)


@client_app.train()
def answer_training(message: Message, context: Context) -> Message:
    """Trains the global model on the hospital's images of the round."""
    work, turn = _places(context)
    network = first_network(work.recipe)
    load_state(network, message.content.array_records["arrays"].to_torch_state_dict())
    number = cast(int, message.content.config_records["config"]["server-round"])
    images = train(work, network, int(context.node_config["partition-id"]), number)
    arrays = ArrayRecord(state_of(network))
    note_bytes(turn, _size(message), arrays.count_bytes())
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": images})})
    return Message(content=content, reply_to=message)


@client_app.evaluate()
def answer_evaluation(message: Message, context: Context) -> Message:
    """Judges the global model on the hospital's validation images."""
    work, turn = _places(context)
    network = first_network(work.recipe)
    load_state(network, message.content.array_records["arrays"].to_torch_state_dict())
    loss, accuracy, images = evaluate(work, network, int(context.node_config["partition-id"]))
    note_bytes(turn, _size(message), 0)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": max(images, 1)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def _places(context: Context) -> tuple[Work, Path]:
    return Work.read(str(context.run_config["work"])), Path(str(context.run_config["turn"]))


def _size(message: Message) -> int:
    return sum(record.count_bytes() for record in message.content.array_records.values())
