"""The door: nginx in front of the SuperLink, through which hospitals reach the fleet interface and nothing else.

Flower 1.41 serves its fleet, control and runtime interfaces on one port, the latter two without any authentication. So the SuperLink
listens on loopback alone, and the door passes on exactly the calls that a registered SuperNode makes.
"""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from server.settings import CoordinatorFolder, CoordinatorSettings

FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""All but `register-node` and `unregister-node`, which are the coordinator's: `flwr.superlink.routers.fleet.router`."""

TEMPLATE = """\
# The door of the federation {{ s.federation }}. Written by `pneumofed` from coordinator.yaml at each start: change it there.
# Paths are relative to the coordinator folder:  nginx -p FOLDER/ -c FOLDER/nginx.conf

worker_processes auto;
pid state/nginx.pid;
error_log state/door-error.log warn;
events {
    worker_connections 1024;
}

http {
    # Time, who, what, how it ended. Neither bodies nor headers, which hold signatures.
    log_format calls '$time_iso8601 $remote_addr "$ssl_client_s_dn" $request_method $uri $status '
                     'in=$request_length out=$bytes_sent $request_time s';
    map "$uri $status" $worth_a_line {
        default 1;
        "/v1/fleet/pull-messages 200"       0;  # each site asks every 3 s
        "/v1/fleet/send-node-heartbeat 200" 0;
    }
    access_log state/door-access.log calls if=$worth_a_line;
    server_tokens off;

    client_body_temp_path state/nginx/body;
    proxy_temp_path       state/nginx/proxy;
    fastcgi_temp_path     state/nginx/fastcgi;
    uwsgi_temp_path       state/nginx/uwsgi;
    scgi_temp_path        state/nginx/scgi;

    ssl_certificate           keys/server.crt;
    ssl_certificate_key       keys/server.key;
    ssl_protocols             TLSv1.2 TLSv1.3;
    ssl_ciphers               ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305;
    ssl_prefer_server_ciphers off;
    ssl_session_cache         shared:door:1m;
    ssl_session_tickets       off;

    # The path as it came, byte for byte: what nginx would decode or tidy up (//, .., %2e, a query) is none of these.
    map $request_uri $fleet_call {
        default "";
{% for call in fleet_calls %}
        "~^/v1/fleet/{{ call }}$" /v1/fleet/{{ call }};
{% endfor %}
    }
{% if s.mutual_tls %}

    # Sites that may come in with a certificate of our CA; one that is revoked is not in this list.
    map $ssl_client_s_dn $known_site {
        default 0;
{% for site in sites %}
        "CN={{ site }},O={{ s.federation }}" 1;
{% endfor %}
    }
{% endif %}

    # Generous: a SuperNode asks every 3 s, and sends a model of 45 MB in pieces of 5 MB. Refusals are 503, which it tries again.
    limit_conn_zone $binary_remote_addr zone=connections:1m;
    limit_req_zone  $binary_remote_addr zone=calls:1m rate=200r/s;

    upstream superlink {
        server 127.0.0.1:{{ s.loopback.superlink }};
        keepalive 32;
    }

    server {
        listen {{ s.port }} ssl;
{% if s.mutual_tls %}
        ssl_client_certificate keys/ca.crt;
        ssl_verify_client on;
        ssl_verify_depth 1;
{% endif %}

        client_max_body_size  512m;  # one piece of a message; the pieces of today's models are 5 MB
        client_body_timeout   60s;
        client_header_timeout 20s;
        send_timeout          60s;
        keepalive_timeout     75s;
        limit_conn connections 256;
        limit_req zone=calls burst=1000 nodelay;

        location / {
            # 404 for all that is no fleet call. Not 403, which a SuperNode takes for the end of the run.
            if ($fleet_call = "") {
                return 404;
            }
            if ($request_method != POST) {
                return 405;
            }
{% if s.mutual_tls %}
            if ($known_site = 0) {
                return 404;
            }
{% endif %}
            proxy_pass https://superlink$fleet_call;
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_set_header Forwarded "";
            proxy_set_header X-Real-IP "";
            proxy_set_header X-Forwarded-Host "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;

            # Node authentication asks the SuperLink for TLS of its own; the certificate is the same.
            proxy_ssl_protocols           TLSv1.2 TLSv1.3;
            proxy_ssl_verify              on;
            proxy_ssl_verify_depth        1;
            proxy_ssl_trusted_certificate keys/ca.crt;
            proxy_ssl_name                localhost;
            proxy_ssl_server_name         on;

            proxy_request_buffering off;  # model weights pass through and never lie on this disk
            proxy_buffering         off;
            proxy_read_timeout      300s;
            proxy_next_upstream     off;  # never send an update twice
        }
    }
{% if s.page_port %}

    # The live page for auditors. It asks for a token itself; only reading and logging in and out pass.
    server {
        listen {{ s.page_port }} ssl;
        client_max_body_size 1k;
        limit_conn connections 64;
        limit_req zone=calls burst=200 nodelay;

        location / {
            set $asked "$request_method $request_uri";
            if ($asked !~ "^((GET|HEAD) |POST /api/(login|logout)$)") {
                return 405;
            }
            proxy_pass http://127.0.0.1:{{ s.loopback.page }};
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
            proxy_buffering off;
            proxy_read_timeout 300s;
        }
    }
{% endif %}
}
"""


def render_door(settings: CoordinatorSettings, sites: Sequence[str]) -> str:
    """nginx's configuration for `settings`; `sites` may come in where mutual TLS is on."""
    return _template().render(s=settings, sites=sites, fleet_calls=FLEET_CALLS)


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    return environment.from_string(TEMPLATE)


def door_command(place: CoordinatorFolder) -> list[str]:
    """Runs nginx in `place` until it is stopped, with all its files in there."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin") or "nginx"
    early_log = str(place.state / "door-error.log")
    return [program, "-p", f"{place.path}/", "-c", str(place.door), "-e", early_log, "-g", "daemon off;"]


def answers(ca: Path, port: int) -> bool:
    """Whether the door on this machine speaks TLS with a valid certificate of the federation. Sends no request."""
    context = ssl.create_default_context(cafile=str(ca))
    try:
        plain = socket.create_connection(("127.0.0.1", port), timeout=2.0)
        with plain, context.wrap_socket(plain, server_hostname="localhost"):
            return True
    except OSError:  # also ssl.SSLError
        return False
