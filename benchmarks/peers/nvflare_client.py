"""The client script of NVFlare's simulator, as NVFlare's PyTorch examples write it: receive, evaluate, train, send."""

import argparse
from pathlib import Path

import nvflare.client as flare
import torch
from nvflare.apis.dxo import MetaKey
from nvflare.client import FLModel
from torch import nn

from benchmarks.peers.work import Work, evaluate, first_network, note_bytes, state_of, train


class Network(nn.Module):
    """The network with its first weights, by the path of this class: NVFlare's server builds it itself."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.network = first_network(Work.read(folder).recipe)


def main() -> None:
    """Answers until the run is over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True)
    parser.add_argument("--turn", required=True)
    options = parser.parse_args()
    work, module = Work.read(options.work), Network(options.work)
    flare.init()
    number = work.number_of(flare.get_site_name())
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        module.load_state_dict(received.params, strict=False)
        _, accuracy, _ = evaluate(work, module.network, number)
        images = train(work, module.network, number, received.current_round + 1)
        state = state_of(module)
        note_bytes(Path(options.turn), _size(received.params), _size(state))
        flare.send(FLModel(params=state, metrics={"accuracy": accuracy}, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: images}))


def _size(params: dict) -> int:
    return sum(torch.as_tensor(value).nbytes for value in params.values())


if __name__ == "__main__":
    main()
