"""Liveness by the standard gRPC health service (grpc.health.v1), which Flower's long-lived processes offer on loopback."""

from __future__ import annotations


def is_serving(address: str, timeout_sec: float = 2.0) -> bool:
    """Whether the health service at `address` (HOST:PORT, without TLS) answers SERVING in time."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_sec)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
