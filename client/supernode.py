"""Flower's SuperNode with a certificate of its own, for a coordinator whose proxy asks for mutual TLS.

    python -P -m client.supernode --client-certificate client.crt --client-key client.key ... what flower-supernode takes ...

`flower-supernode` of Flower 1.41 cannot present a client certificate: its HTTP client builds a TLS context from the root certificates
alone. This entry point gives that context the certificate, and leaves everything else to Flower.
"""

from __future__ import annotations

import argparse
import ssl
import sys
from collections.abc import Callable, Sequence
from typing import Any

from flwr.supernode import fleet_http_connection
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from common.errors import ConfigError


def client_with_certificate(certificate: str, key: str) -> type[FleetHttpClient]:
    """Flower's client of the fleet interface, which shows `certificate` when it is asked for one.

    Raises:
        ConfigError: the certificate or its key cannot be read, or they do not belong together.
    """
    _load(ssl.create_default_context(), certificate, key)  # now, and not in the middle of a connection

    class Client(FleetHttpClient):
        def __init__(self, base_url: str, *, verify: ssl.SSLContext | bool | str = True, **options: Any) -> None:
            if not isinstance(verify, ssl.SSLContext):
                raise ConfigError("a client certificate needs --root-certificates, and no --insecure")
            _load(verify, certificate, key)
            super().__init__(base_url, verify=verify, **options)

    return Client


def main(arguments: Sequence[str] | None = None, start: Callable[[], None] = flower_supernode) -> None:
    """Starts Flower's SuperNode, whose own options are all that is left after ours."""
    parser = argparse.ArgumentParser(prog="python -m client.supernode", add_help=False, allow_abbrev=False)
    parser.add_argument("--client-certificate", required=True)
    parser.add_argument("--client-key", required=True)
    ours, theirs = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    fleet_http_connection.FleetHttpClient = client_with_certificate(ours.client_certificate, ours.client_key)  # type: ignore[misc]
    sys.argv = ["flower-supernode", *theirs]
    start()


def _load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the client certificate {certificate} and its key {key} cannot be used: {error}; take both from the kit"
        ) from error


if __name__ == "__main__":
    main()
