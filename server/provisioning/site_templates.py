"""What a hospital's kit says: its configuration, its start script, and half a page for its IT."""

SITE = """\
# This hospital's own settings. They are never sent.
name: {{ site.name | tojson }}
manifest: data/manifest.csv   # written by `pneumofed site data add`
work_dir: work                # cache, logs, audit log
device: auto                  # auto, cpu, cuda or cuda:0
threads: 0                    # CPU threads of training; 0 leaves the choice to PyTorch
policy: policy.yaml
"""

CONNECTION = """\
# How this hospital reaches the coordinator. Paths are relative to this file.
coordinator: {{ host }}:{{ port }}
ca: keys/ca.crt     # the only certificate authority that is trusted for this connection
key: keys/node      # private; stays here
{% if mutual_tls %}
client_certificate: keys/client.crt
client_key: keys/client.key
{% endif %}
"""

START = """\
#!/bin/sh
# Connects this hospital to the federation {{ federation }} and stays in the foreground; systemd and Docker start this.
set -eu
cd "$(dirname "$0")"
exec "${PNEUMOFED:-pneumofed}" site start --foreground
"""

UNIT = """\
# cp to /etc/systemd/system/, mend User, the three paths and PNEUMOFED, then: systemctl enable --now pneumofed-{{ site.name }}
[Unit]
Description=pneumofed: site {{ site.name }} of the federation {{ federation }}
Wants=network-online.target
After=network-online.target

[Service]
User=pneumofed
WorkingDirectory=/srv/pneumofed/{{ site.name }}
Environment=PNEUMOFED=/srv/pneumofed/venv/bin/pneumofed
ExecStart=/srv/pneumofed/{{ site.name }}/start.sh
Restart=always
RestartSec=30
TimeoutStopSec=60
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes
ReadWritePaths=/srv/pneumofed/{{ site.name }}

[Install]
WantedBy=multi-user.target
"""

COMPOSE = """\
# docker compose up -d      Put the pneumofed wheel that you got from the coordinator into software/ first.
services:
  site:
    build:
      context: .
      dockerfile_inline: |
        FROM python:3.11-slim
        COPY software/*.whl /software/
        RUN pip install --no-cache-dir /software/*.whl
    command: ["/site/start.sh"]
    user: "${UID:-1000}:${GID:-1000}"
    environment:
      HOME: /tmp
    volumes:
      - .:/site
    shm_size: 1gb
    restart: always
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
"""

DOCKERIGNORE = """\
*
!software
"""

README = """\
# {{ site.name }}: start-up kit for the federation {{ federation }}

With this kit your hospital trains a model on its own chest X-rays, together with others. Images, names and reports never leave
it; model weights and counts do, and `work/audit.jsonl` records each of them. Treat `keys/` like a password.

**Network.** One outgoing connection, TCP to `{{ host }}` port `{{ port }}`, TLS. Nothing comes in. A proxy in `HTTPS_PROXY` is
used, but one that opens TLS is refused.

**Before you start**

1. Install Python 3.11 and the pneumofed wheel that the coordinator gave you: `pip install pneumofed-*.whl`.
2. As the service's user: `pneumofed site init {{ site.name }} --kit {{ site.name }}.tar.gz && cd {{ site.name }}`.
{% if own_key %}
3. The private key that you made belongs into `keys/node`, mode 0600. It must fit `keys/node.pub`, and nobody else may have it.
{% if mutual_tls %}
   Then: `cp keys/node keys/client.key && ssh-keygen -p -q -m PKCS8 -P "" -N "" -f keys/client.key`
   and take `connection.yaml` from the kit.
{% endif %}
{% else %}
3. Delete the archive, and the mail or medium that it came on. To make the key yourself instead, tell the coordinator.
{% endif %}
4. Read `policy.yaml` and set what may run here. It is yours alone and wins over every run.
5. Call the coordinator{{ " (" ~ contact ~ ")" if contact else "" }} on a number that you know and compare this key's fingerprint:
   `{{ fingerprint }}`

**Run it**, in this folder

    pneumofed site data add ...     # your images and labels; see docs/data.md
    pneumofed site preflight        # clock, disk, certificates, connection, data; says how to mend each problem
    pneumofed site start            # or start.sh under systemd (pneumofed-{{ site.name }}.service) or Docker (compose.yaml)
    pneumofed site status
    pneumofed site stop

**If a key gets out**, stop the service and call the coordinator, who revokes it at once. **From a later kit** take
`connection.yaml` and `keys/` alone: `site.yaml` and `policy.yaml` are yours.
"""
