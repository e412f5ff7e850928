#!/bin/bash
# As the official image: makes the database at the first start, with the user and the password that are wanted.
set -euo pipefail
if [[ ! -s $PGDATA/PG_VERSION ]]; then
    : "${POSTGRES_PASSWORD_FILE:?a password is wanted}"
    initdb --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" >/dev/null
    printf 'host all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
    # what is half made is not answered for: by a socket only, as pg_isready asks by TCP
    pg_ctl --wait --options="-c listen_addresses=" start >/dev/null
    psql --username="$POSTGRES_USER" --dbname=postgres --quiet --command="CREATE DATABASE \"$POSTGRES_DB\"" </dev/null
    pg_ctl --wait --mode=fast stop >/dev/null
fi
exec "$@" -c listen_addresses='*'
