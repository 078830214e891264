#!/bin/sh
# Connects this hospital to the federation {{ federation }} and stays in the foreground; systemd and Docker start this.
set -eu
cd "$(dirname "$0")"
exec "${PNEUMOFED:-pneumofed}" site start --foreground
