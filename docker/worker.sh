#!/bin/sh
# Starts a command in a worker's container: worker COMMAND...
# MLflow's client finds its account in a file, where every process of the container finds it: those of
# 'docker compose exec', Ray's and SLURM's too. Variables that name an account go before it.
set -eu
umask 077
secret=${MLFLOW_PASSWORD_FILE:-/run/secrets/mlflow_sweep_password}
if [ -z "${MLFLOW_TRACKING_PASSWORD:-}" ]; then
    if [ ! -f "$secret" ] || [ ! -s "$secret" ]; then
        echo "worker: no password in $secret: make it by docker/make-secrets.sh" >&2
        exit 78
    fi
    # a per cent sign is an escape in that file
    password=$(sed 's/%/%%/g' "$secret")
    printf '[mlflow]\nmlflow_tracking_username = %s\nmlflow_tracking_password = %s\n' \
        "${MLFLOW_USER:-sweep}" "$password" >"$HOME/.mlflow/credentials"
fi
umask 022
exec "$@"
