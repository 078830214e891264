"""Sending to sites and waiting for their replies, with an end to the waiting and a name for everyone who did not answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from common.messages import Failure, read_failure

POLL_SEC = 0.1


@dataclass
class Replies:
    """What came back, by site, sorted by name."""

    answers: dict[str, Message] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


def exchange(grid: Grid, messages: Mapping[str, Message], timeout_sec: float) -> Replies:
    """Sends one message a site and collects the replies until all are there or `timeout_sec` has passed.

    A site is known by the message that it answers: an error reply that Flower writes for a lost node does not name the node.
    """
    ids = list(grid.push_messages(messages.values()))
    waiting = {identifier: site for identifier, site in zip(ids, messages, strict=True) if identifier}
    refused = [site for identifier, site in zip(ids, messages, strict=True) if not identifier]
    replies = Replies(failures={site: Failure(site, "Unreachable", "the message could not be handed over") for site in refused})
    deadline = time.monotonic() + timeout_sec
    while waiting and time.monotonic() < deadline:
        for message in grid.pull_messages(list(waiting)):
            site = waiting.pop(message.metadata.reply_to_message_id)
            _sort_in(replies, site, message)
        if waiting:
            time.sleep(POLL_SEC)
    for site in waiting.values():
        replies.failures[site] = Failure(site, "Timeout", f"no reply within {timeout_sec:g} s")
    return Replies(dict(sorted(replies.answers.items())), dict(sorted(replies.failures.items())))


def _sort_in(replies: Replies, site: str, message: Message) -> None:
    if message.has_error():
        replies.failures[site] = read_failure(message)
    else:
        replies.answers[site] = message
