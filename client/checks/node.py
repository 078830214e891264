"""Asks the coordinator whether it knows this site's key, as a SuperNode would, and leaves again at once."""

from __future__ import annotations

from pathlib import Path

import httpx
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.keys import read_private_key
from common.party_config import ConnectionConfig


def ask_for_admission(connection: ConnectionConfig, patience_sec: float) -> str | None:
    """None where the coordinator takes the site's key, else what it said.

    For a moment the site counts as connected. Not to be called while its SuperNode runs, whose place it would take.

    Raises:
        ConfigError: a key or certificate of the site cannot be used.
    """
    private = read_private_key(Path(connection.key))
    public = public_key_to_bytes(private.public_key())
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    try:
        with _client(connection).from_server_address(connection.coordinator, False, connection.ca, interceptors) as client:
            client._client.timeout = httpx.Timeout(patience_sec)
            answer = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL))
            client.DeactivateNode(DeactivateNodeRequest(node_id=answer.node_id))
    except httpx.HTTPStatusError as error:
        told = FlowerError.from_json(error.response.text)
        return told.message if told else f"HTTP {error.response.status_code}"
    except httpx.HTTPError as error:
        return type(error).__name__
    return None


def _client(connection: ConnectionConfig) -> type[FleetHttpClient]:
    if connection.client_certificate is None:
        return FleetHttpClient
    from client.supernode import client_with_certificate

    return client_with_certificate(connection.client_certificate, str(connection.client_key))
