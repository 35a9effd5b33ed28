#!/bin/bash
# A real Slurm of its own on this machine: munged, slurmctld and N slurmd as root on loopback, no systemd, no cgroups.
#   tests/slurm/cluster.sh up DIR [NODES]     installs Slurm where it is missing (apt), starts it, waits until nodes are idle
#   tests/slurm/cluster.sh down DIR           stops what `up DIR` started, by its own pids
#   tests/slurm/cluster.sh kill DIR NODE      SIGKILL to a node's slurmd and to every process of its jobs: the node dies
#   tests/slurm/cluster.sh start DIR NODE     the node comes back
# CLUSTER_GPUS=8 gives every node eight GPUs that are none; CLUSTER_PORT=N sets the first port, for a second cluster, and its
# first job's number: jobs choose their own ports by it.
# Then: export SLURM_CONF=DIR/slurm.conf. Exit code 3, after one sentence, where a Slurm cannot run here.
# It keeps to DIR and to its own ports, configuration, key and sockets; another Slurm of the machine is never spoken to.
set -euo pipefail

cannot() { echo "no Slurm here: $*" >&2; exit 3; }
action=${1:-}; dir=${2:-}; count=${3:-2}
[ -n "$dir" ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
base=${CLUSTER_PORT:-17100}   # ports: slurmctld, then the nodes

install() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    command -v apt-get >/dev/null || cannot "slurmctld, slurmd and munged are not installed and there is no apt-get to install them"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$dir/install.log" 2>&1 \
        || cannot "apt-get could not install slurm-wlm and munge, see $dir/install.log"
}

alive() { # pid file, daemon: it runs (and is no other process that has the number of one that is gone)
    [ -s "$1" ] && [ "$(ps -o comm= -p "$(cat "$1")" 2>/dev/null)" = "$2" ]
}

stop() { # pid file, daemon
    alive "$@" || return 0
    local pid; pid=$(cat "$1")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
}

down() {
    if alive "$dir/slurmctld.pid" slurmctld; then
        export SLURM_CONF=$dir/slurm.conf
        squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel 2>/dev/null || true
        for _ in $(seq 100); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
    fi
    local file
    for file in "$dir"/slurmd.*.pid; do [ -e "$file" ] && stop "$file" slurmd; done
    stop "$dir/slurmctld.pid" slurmctld
    stop "$dir/munge/pid" munged
    if [ -L "$dir/munge" ]; then
        rm -rf "$(readlink "$dir/munge")"
        rm -f "$dir/munge"
    fi
    if [ -f "$dir/hosts.added" ]; then
        # the lines that `up` added, and only those (rewritten in place: /etc/hosts may be a mount)
        local kept; kept=$(grep -v "# swax-cluster $dir\$" /etc/hosts || true)
        printf '%s\n' "$kept" >/etc/hosts
        rm -f "$dir/hosts.added"
    fi
}

up() {
    [ "$(uname)" = Linux ] || cannot "it needs Linux"
    [ "$(id -u)" = 0 ] || cannot "its daemons run as root, this is $(id -un)"
    [ -w /etc/hosts ] || cannot "/etc/hosts cannot be written: node names must resolve"
    if alive "$dir/slurmctld.pid" slurmctld; then cannot "one is running in $dir already; stop it with '$0 down $dir'"; fi
    local port
    for port in $(seq $base $((base + count))); do
        ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || cannot "port $port is in use"
    done
    install
    rm -rf "$dir"/{state,log,spool,dev}
    mkdir -p "$dir"/{state,log,spool,dev}
    # munge wants every folder above its socket open to all, and DIR may lie in a private one
    local munge; munge=$(mktemp -d /tmp/swax_munge.XXXXXX)
    chmod 755 "$munge"
    ln -sfn "$munge" "$dir/munge"
    local host last=$((count - 1)) node
    host=$(hostname -s)
    for node in $(seq 0 $last); do
        echo "127.0.0.1 sn$node # swax-cluster $dir" >>/etc/hosts
    done
    touch "$dir/hosts.added"
    (umask 077; dd if=/dev/urandom of="$munge/key" bs=1 count=1024 status=none)
    # cred_expire: otherwise a requeue waits two minutes. Fake GPUs need files: Count= alone drains a node.
    cat >"$dir/slurm.conf" <<CONF
ClusterName=swax
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
FirstJobId=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=3,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
KillWait=30
MinJobAge=600
OverTimeLimit=0
${CLUSTER_GPUS:+GresTypes=gpu}
NodeName=sn[0-$last] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((base + 1))-$((base + count))] Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 ${CLUSTER_GPUS:+Gres=gpu:$CLUSTER_GPUS} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=short Nodes=ALL Default=NO MaxTime=60 State=UP OverSubscribe=NO
CONF
    if [ -n "${CLUSTER_GPUS:-}" ]; then
        for gpu in $(seq 0 $((CLUSTER_GPUS - 1))); do ln -s /dev/null "$dir/dev/gpu$gpu"; done
        echo "NodeName=sn[0-$last] Name=gpu File=$dir/dev/gpu[0-$((CLUSTER_GPUS - 1))]" >"$dir/gres.conf"
    else
        rm -f "$dir/gres.conf"
    fi
    trap 'down' ERR
    munged --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" \
        --log-file="$munge/log" --seed-file="$munge/seed" --num-threads=2
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -c
    for node in $(seq 0 $last); do start "sn$node"; done
    for _ in $(seq 600); do
        [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = "$count" ] && { sinfo -N -p main -o '%N %T %c %G'; return; }
        sleep 0.2
    done
    trap - ERR
    sinfo -N -o '%N %T %E' >&2 || true
    down
    echo "the nodes did not become idle in two minutes, see $dir/log" >&2   # a failure, no reason to skip
    exit 1
}

start() { slurmd -c -N "$1"; }

kill_node() { # the node's daemon, its step daemons and all their children, as when a machine loses power
    local pids="" pid children
    ! alive "$dir/slurmd.$1.pid" slurmd || pids=$(cat "$dir/slurmd.$1.pid")
    # step daemons and what they started bear the node's name in their environment or command
    local environment
    for pid in /proc/[0-9]*; do
        environment=$({ tr '\0' '\n' <"$pid/environ"; } 2>/dev/null) || continue
        grep -qx "SLURM_CONF=$dir/slurm.conf" <<<"$environment" && grep -qx "SLURMD_NODENAME=$1" <<<"$environment" || continue
        pids="$pids ${pid#/proc/}"
    done
    for pid in $pids; do
        for children in $(ps -o ppid= -p "$pid" 2>/dev/null); do
            case $(ps -o comm= -p "$children" 2>/dev/null) in slurmstepd*) pids="$pids $children" ;; esac
        done
    done
    kill -9 $pids 2>/dev/null || true
    rm -f "$dir/slurmd.$1.pid"
}

case $action in
    up) up ;;
    down) down ;;
    start) export SLURM_CONF=$dir/slurm.conf; start "${3:?name the node}" ;;
    kill) kill_node "${3:?name the node}" ;;
    *) echo "error: unknown action $action: use up, down, start or kill" >&2; exit 2 ;;
esac
