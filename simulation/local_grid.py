"""A Flower grid on one machine without Ray: messages are answered by worker processes, or in this process one after the other.

In this process also for tests and for debugging with breakpoints. The apps cannot distinguish it from another grid; a test holds that the
weights are those of Flower's own simulation bit for bit, with any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from pneumofed.simulation.workers import RUN_ID, HospitalWorkers, take_identity

FIRST_NODE_ID = 1000
LONGEST_PULL_SEC = 0.5
"""How long a pull waits where no reply is there; the caller's deadlines are looked at in between."""


class LocalGrid(Grid):
    """A grid of `len(node_configs)` nodes that run `client_app`; `on_send` is called before each batch of messages.

    With `workers` their processes answer, as many messages at once as there are, by their own ClientApp; `client_app` is None then.
    """

    def __init__(
        self,
        client_app: ClientApp | None,
        node_configs: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any],
        on_send: Callable[[], None] = lambda: None,
        workers: HospitalWorkers | None = None,
    ) -> None:
        take_identity()
        self._client_app = client_app
        self._on_send = on_send
        self._workers = workers
        self._waiting: dict[str, Message] = {}
        self._working: dict[str, Future[Message]] = {}
        self._contexts = {
            FIRST_NODE_ID + number: Context(RUN_ID, FIRST_NODE_ID + number, dict(node_config), RecordDict(), dict(run_config))
            for number, node_config in enumerate(node_configs)
        }
        self._run = Run.create_empty(RUN_ID)

    def set_run(self, run: Run) -> None:
        """Sets the run whose id and options `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(  # the abstract signature is Flower's
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Makes a message to a node, as Flower's `Grid` does.

        Args:
            content: what it carries.
            message_type: names the function of the ClientApp that answers, e.g. `train` or `query.NAME`.
            dst_node_id: one of `get_node_ids`.
            group_id: passed on unchanged.
            ttl: seconds for which it is valid; None: Flower's default. Nothing expires here.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Returns the ids of all nodes, in the order of their configs."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keeps the messages. Without workers each is answered when its reply is asked for, so that one reply at a time is in memory."""
        self._on_send()
        return [self._keep(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that are there, and waits a moment where no message at all has one; without workers one is made now.

        Args:
            message_ids: of `push_messages`.
        """
        wanted = list(message_ids)
        if not self._working.keys().isdisjoint(wanted):
            # Who asks again and again would be told up to a whole interval late. Not for those that are wanted only: who asks for some
            # hundred replies a few at a time would wait for each few that nobody has begun, while others pile up.
            wait(self._working.values(), timeout=LONGEST_PULL_SEC, return_when=FIRST_COMPLETED)
        ready = [message_id for message_id in wanted if message_id in self._working and self._working[message_id].done()]
        own = [message_id for message_id in wanted if message_id in self._waiting][:1]
        answered = [self._working.pop(message_id).result() for message_id in ready]
        return answered + [self._answer(self._waiting.pop(message_id)) for message_id in own]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Answers messages, in their order.

        Args:
            messages: each to a node of this grid.
            timeout: not used: an answer is waited for.
        """
        sent = list(self.push_messages(messages))
        wait([self._working[message_id] for message_id in sent if message_id in self._working])
        return [reply for message_id in sent for reply in self.pull_messages([message_id])]

    def _keep(self, message: Message) -> str:
        message_id = str(uuid4())
        message.metadata.__dict__["_message_id"] = message_id  # Flower's own grids set it so; there is no setter
        if self._workers is None:
            self._waiting[message_id] = message
        else:
            self._working[message_id] = self._workers.answer(message, self._contexts[message.metadata.dst_node_id])
        return message_id

    def _answer(self, message: Message) -> Message:
        assert self._client_app is not None  # without workers there is one
        return self._client_app(message, self._contexts[message.metadata.dst_node_id])
