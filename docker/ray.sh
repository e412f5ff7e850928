#!/bin/sh
# One node of a Ray cluster: ray-node head, or ray-node worker ADDRESS. Both have the cluster's token from a file.
set -eu
token=${RAY_AUTH_TOKEN_PATH:-/run/secrets/ray_token}
if [ ! -f "$token" ] || [ ! -s "$token" ]; then
    echo "ray-node: no token in $token: make it by docker/make-secrets.sh" >&2
    exit 78
fi
case ${1:-} in
    head) where="--head --port=6379 --include-dashboard=false" ;;
    worker) where="--address=${2:?the address of the head}" ;;
    *)
        echo "ray-node: '${1:-}' is no role of a node (head, worker ADDRESS)" >&2
        exit 64
        ;;
esac
[ -z "${RAY_NODE_CPUS:-}" ] || where="$where --num-cpus=$RAY_NODE_CPUS"
# actors keep no objects that are worth the third of the memory which Ray would take for them
# shellcheck disable=SC2086
exec ray start $where --block --disable-usage-stats --object-store-memory="${RAY_OBJECT_STORE_BYTES:-200000000}"
