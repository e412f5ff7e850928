#!/bin/sh
# One container of a SLURM cluster: slurm-node controller, or slurm-node node; slurm-node health says how it is.
set -eu
key=/run/secrets/munge_key
nodes=${SLURM_NODES:-2}
cpus=${SLURM_NODE_CPUS:-2}
memory=${SLURM_NODE_MEMORY_MB:-4000}

role=${1:-}
case $role in
    controller | node) ;;
    health)
        # each asks the controller, which also needs a munged that works
        case $(hostname) in
            slurm-controller) exec scontrol ping ;;
            *) sinfo --noheader --nodes="$(hostname)" --format=%T | grep -Eqx 'idle|mixed|allocated|completing' ;;
        esac
        exit
        ;;
    *)
        echo "slurm-node: '$role' is no role of a container (controller, node)" >&2
        exit 64
        ;;
esac

if [ ! -f "$key" ] || [ ! -s "$key" ]; then
    echo "slurm-node: no key in $key: make it by docker/make-secrets.sh" >&2
    exit 78
fi
for number in "$nodes" "$cpus" "$memory"; do
    case $number in
        '' | *[!0-9]* | 0*)
            echo "slurm-node: '$number' in SLURM_NODES, SLURM_NODE_CPUS or SLURM_NODE_MEMORY_MB is no positive number" >&2
            exit 64
            ;;
    esac
done

# munged takes a key only from its own user, and readable to nobody else
(umask 077 && cp "$key" /run/munge/key)
rm -f /run/munge/munge.socket.2*
munged --key-file=/run/munge/key --pid-file=/run/munge/munged.pid --log-file=/run/munge/munged.log \
    --seed-file=/run/munge/seed

sed -e "s/@USER@/$(id -un)/" -e "s/@NODES@/$nodes/" -e "s/@CPUS@/$cpus/g" -e "s/@MEMORY@/$memory/" \
    -e "s/@MEMORY_PER_CPU@/$((memory / cpus))/" /etc/repro-sweep/slurm.conf >"$SLURM_CONF"
# without this file the daemons look for one below /etc
echo 'CgroupPlugin=cgroup/v1' >"$(dirname "$SLURM_CONF")/cgroup.conf"

case $role in
    controller) exec slurmctld -D ;;
    node) exec slurmd -D -N "$(hostname)" ;;
esac
