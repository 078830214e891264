"""What the coordinator's and the auditors' kits say."""

SETTINGS_HEAD = """\
# The coordinator of {{ federation }}. Written by `pneumofed provision` from the federation file: change it there.
"""

LOCAL = """\
# cp local.example.yaml local.yaml      The coordinator's own settings, which no new kit overwrites. Paths are relative to this file.

# Held-out sets that every run is judged on: manifests made by `pneumofed site data add` or by hand (docs/data.md).
test_manifest: null
external_manifest: null
cache_dir: state/cache

# Where the coordinator judges: auto, cpu, cuda or cuda:0, and CPU threads (0 leaves the choice to PyTorch).
device: auto
threads: 0

# Database of sites and runs, e.g. postgresql://USER@HOST/NAME; null is SQLite in state/registry.db.
registry: null
"""

START = """\
#!/bin/sh
# Starts the coordinator of {{ federation }} and stays in the foreground; systemd and Docker start this.
set -eu
cd "$(dirname "$0")"
exec "${PNEUMOFED:-pneumofed}" server start --foreground
"""

UNIT = """\
# cp to /etc/systemd/system/, mend User, the three paths and PNEUMOFED, then: systemctl enable --now pneumofed-coordinator
[Unit]
Description=pneumofed: coordinator of the federation {{ federation }}
Wants=network-online.target
After=network-online.target

[Service]
User=pneumofed
WorkingDirectory=/srv/pneumofed/coordinator
Environment=PNEUMOFED=/srv/pneumofed/venv/bin/pneumofed
ExecStart=/srv/pneumofed/coordinator/start.sh
Restart=always
RestartSec=10
TimeoutStopSec=90
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes
ReadWritePaths=/srv/pneumofed/coordinator

[Install]
WantedBy=multi-user.target
"""

COMPOSE = """\
# docker compose up -d      Put the pneumofed wheel into software/ first.
services:
  coordinator:
    build:
      context: .
      dockerfile_inline: |
        FROM python:3.11-slim
        RUN apt-get update && apt-get install -y --no-install-recommends nginx-light && rm -rf /var/lib/apt/lists/*
        COPY software/*.whl /software/
        RUN pip install --no-cache-dir /software/*.whl
    command: ["/coordinator/start.sh"]
    user: "${UID:-1000}:${GID:-1000}"
    environment:
      HOME: /tmp
    volumes:
      - .:/coordinator
    ports:
      - "{{ port }}:{{ port }}"
{% if page_port %}
      - "{{ page_port }}:{{ page_port }}"
{% endif %}
    restart: always
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
"""

README = """\
# Coordinator of the federation {{ federation }}

`keys/server.key` and `keys/superexec.secret` are secret. The certificate authority is not in this kit: keep it (`ca/`, beside the
kits) offline, and back it up.

1. A machine of its own: who can log in here can submit runs, since Flower's control interface on 127.0.0.1 asks for no password.
2. Install Python 3.11, the pneumofed wheel and nginx (`apt install nginx-light`; its own service can stay off), and unpack, keeping
   modes: `tar xzf coordinator.tar.gz && cd coordinator`.
3. `cp local.example.yaml local.yaml`, and set the held-out test sets there.
4. Open TCP port {{ port }}{{ " and, for auditors, " ~ page_port if page_port else "" }} in the firewall. Nothing else.

Run it, in this folder:

    pneumofed server start          # or start.sh under systemd (pneumofed-coordinator.service) or Docker (compose.yaml)
    pneumofed server status
    pneumofed server run ...
    pneumofed server stop

**A new or a revoked site**: change the federation file, run `pneumofed provision` again, unpack this kit over the old one
(`local.yaml`, `state/` and `runs/` stay) and `pneumofed server start` again: what runs goes on, new keys are registered, revoked
ones refused. Do so, with a stop before it, also before {{ expires }}, when the server certificate ends.
"""

AUDITOR_README = """\
# {{ auditor.name }}: reading access to the federation {{ federation }}

This kit lets you read the coordinator's live page: sites, rounds, metrics, privacy spent, activity. It can change nothing and holds
no key of any hospital. `token` is secret, like a password.
{% if contact %}
If it gets out, tell the coordinator at once: {{ contact }}.
{% endif %}

    curl --cacert ca.crt -H "Authorization: Bearer $(cat token)" https://{{ host }}:{{ page_port }}/

For a browser, import `ca.crt` as a certificate authority into a profile that you use for this alone, open
https://{{ host }}:{{ page_port }}/ and paste the token where the page asks for it.
"""
