#!/bin/sh
# Starts the coordinator of {{ federation }} and stays in the foreground; systemd and Docker start this.
set -eu
cd "$(dirname "$0")"
exec "${PNEUMOFED:-pneumofed}" server start --foreground
