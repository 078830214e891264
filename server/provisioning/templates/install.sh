#!/bin/sh
# Installs pneumofed from this folder, without any network:  install.sh ENVIRONMENT [LIST]
# ENVIRONMENT is made, e.g. /srv/pneumofed/venv. LIST is requirements.lock of your kit: only wheels with the hashes in it are taken.
# Without it the list beside the wheels is used, which shows damage but not who exchanged both.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
environment="${1:?give the folder of the new environment}"
list="${2:-$here/requirements.lock}"
"${PYTHON:-python3}" -m venv "$environment"
PIP_CONFIG_FILE=/dev/null "$environment/bin/pip" --isolated --disable-pip-version-check install --no-index --find-links "$here" \
    --require-hashes -r "$list"
"$environment/bin/pneumofed" --version
