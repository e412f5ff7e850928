#!/bin/sh
# Makes the secrets that compose.yaml reads, each at random: make-secrets.sh [DIRECTORY]. One that is there is kept.
# The folder is its owner's alone. The files in it must be readable to all, as each is shown to the users of containers.
set -eu
cd "$(dirname "$0")"
folder=${1:-secrets}
mkdir -p "$folder"
chmod 0700 "$folder"

make() { # make NAME COMMAND...: never overwrites, and leaves nothing by halves
    name=$1
    shift
    if [ -e "$folder/$name" ]; then
        echo "$folder/$name: kept"
        return
    fi
    "$@" >"$folder/.$name.new"
    chmod 0444 "$folder/.$name.new"
    # unlike mv, it fails where somebody has just made the other
    ln "$folder/.$name.new" "$folder/$name"
    rm "$folder/.$name.new"
    echo "$folder/$name: made"
}

word() { od -An -v -tx1 -N 24 /dev/urandom | tr -d ' \n'; }
key() { head -c 1024 /dev/urandom; }

make postgres_password word
make mlflow_admin_password word
make mlflow_sweep_password word
make mlflow_secret_key word
make ray_token word
make munge_key key
