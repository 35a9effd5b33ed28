# Sourced by the batch scripts. Topology comes from SLURM_* alone, everything of a site from slurm/site.sh.
# `home` is the project's folder. Exit codes: docs/slurm.md.
set -euo pipefail

say() { printf '%s [job %s] %s\n' "$(date '+%F %T')" "${SLURM_JOB_ID:-none}" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# ---- the site: modules, environment, container, scratch, network -------------------------------------------------------------
load_site() {
    local site=${SWAX_SITE:-$home/slurm/site.sh}
    if [ -f "$site" ]; then
        . "$site"
    elif [ -n "${SWAX_SITE:-}" ]; then
        die "SWAX_SITE=$site does not exist: copy slurm/site.example.sh there"
    fi
    if [ -n "${SWAX_MODULES:-}" ]; then
        command -v module >/dev/null || die "SWAX_MODULES is set, but this node has no 'module' command: source its setup in slurm/site.sh"
        module purge && module load $SWAX_MODULES
    fi
    if [ -n "${SWAX_VENV:-}" ]; then
        . "$SWAX_VENV/bin/activate"
    elif [ -z "${SWAX_CONTAINER:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f "$home/.venv/bin/activate" ]; then
        . "$home/.venv/bin/activate"   # what `make install` made
    fi
    python=${SWAX_PYTHON:-python}
    scratch=${SWAX_SCRATCH:-/tmp}
    [ -n "${SWAX_SCRATCH:-}" ] || say "SWAX_SCRATCH is not set: caches go to /tmp on each node"

    here=() step=()   # prefixes: of a command on this node, and srun options of a step on all nodes
    inside=()         # what a step puts before its command
    case ${SWAX_CONTAINER_RUNTIME:-} in
        "") [ -z "${SWAX_CONTAINER:-}" ] || die "SWAX_CONTAINER is set: name its runtime too, SWAX_CONTAINER_RUNTIME=pyxis or apptainer" ;;
        apptainer)
            inside=(apptainer exec --nv --bind "${SWAX_CONTAINER_MOUNTS:-$home}" "$SWAX_CONTAINER")
            here=("${inside[@]}") ;;
        pyxis)
            step=(--container-image="$SWAX_CONTAINER" --container-mounts="${SWAX_CONTAINER_MOUNTS:-$home:$home}" --no-container-mount-home)
            here=(srun --nodes=1 --ntasks=1 --overlap "${step[@]}") ;;
        *) die "SWAX_CONTAINER_RUNTIME=$SWAX_CONTAINER_RUNTIME: must be pyxis or apptainer" ;;
    esac
}

# ---- the job: who and where we are -------------------------------------------------------------------------------------------
load_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || die "this is a batch script: submit it with sbatch, or check and submit with python -m launcher.submit"
    nodes=$SLURM_JOB_NUM_NODES
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$((10000 + SLURM_JOB_ID % 20000))   # below the ephemeral ports
    restart=${SLURM_RESTART_COUNT:-0}
    job=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}-$SLURM_ARRAY_TASK_ID
}

# ---- environment of every rank -----------------------------------------------------------------------------------------------
export_environment() { # folder of this start's logs
    local logs=$1
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 HF_HUB_OFFLINE=1
    export TRITON_CACHE_DIR=$scratch/swax_triton_$(id -u) TORCHINDUCTOR_CACHE_DIR=$scratch/swax_inductor_$(id -u)
    if [ -n "${SWAX_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$SWAX_INTERFACE GLOO_SOCKET_IFNAME=$SWAX_INTERFACE
    fi
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} NCCL_DEBUG_FILE=$logs/nccl_%h_%p.log
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}   # agents that end one after the other warn of each other
    # the flight recorder: the last collectives of each rank, written where one waits too long
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_FR_DUMP_TEMP_FILE=$logs/flight_rank_
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1
}

on_every_node() { # command: one task a node, all CPUs of the node
    # a step of an --exclusive job that asked for no GPUs gets none of those it has, unless it asks
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --distribution=block \
        ${SLURM_GPUS_ON_NODE:+--gres=gpu:"$SLURM_GPUS_ON_NODE"} --kill-on-bad-exit=1 --unbuffered "${step[@]}" "${inside[@]}" "$@"
}

run_one() { # arguments of python: one process on one node, with the CPUs of the job; `dry` set: only say it
    export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
    say "$python $*"
    [ -n "$dry" ] || srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${step[@]}" "${inside[@]}" "$python" "$@"
}

# ---- signals -----------------------------------------------------------------------------------------------------------------
# USR1 (sbatch --signal) announces the time limit: the steps save, then this script requeues the job. TERM comes from Slurm
# itself with a requeue, a preemption or a cancellation, to the steps as well: wait for them, and leave the rest to Slurm.
time_is_up='' told_by_slurm='' interrupted=''
on_usr1() {
    interrupted=1
    [ -z "$time_is_up" ] || return 0
    time_is_up=1
    say "the time limit is near: telling every rank to save"
    scancel --signal=USR1 "$SLURM_JOB_ID" || true
}
on_term() {
    interrupted=1
    [ -n "$told_by_slurm" ] || say "Slurm ends this allocation: waiting for the ranks to save"
    told_by_slurm=1
}

await() { # pid: its exit code in `code`, however many signals arrive meanwhile
    local status
    code=0
    while :; do
        interrupted=''
        wait "$1" && status=0 || status=$?
        [ "$status" = 127 ] || code=$status
        [ -n "$interrupted" ] && kill -0 "$1" 2>/dev/null || break
    done
    if [ -n "$interrupted" ]; then wait "$1" && code=0 || { status=$?; [ "$status" = 127 ] || code=$status; }; fi
}

requeue() { # reason, nodes to leave out (may be empty)
    say "requeue: $1${2:+; leaving out $2}"
    trap '' TERM USR1   # Slurm ends this script now
    if [ -z "$2" ]; then
        scontrol requeue "$SLURM_JOB_ID" || return 1
    else
        # an exclusion can be set while a job is pending: hold, exclude, release, before Slurm's SIGKILL comes
        scontrol requeuehold "$SLURM_JOB_ID" || return 1
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$2" || say "could not exclude $2"
        scontrol release "$SLURM_JOB_ID"
    fi
    exit 75
}

# ---- a training job ----------------------------------------------------------------------------------------------------------
usage() {
    cat <<TEXT
usage: sbatch [options of sbatch] $1 [--config FILE] [--sweep FILE] [--dry-run] [section.field=value ...]
  --config FILE   configuration (default: $2)
  --sweep FILE    points of an array job, written by python -m launcher.submit --sweep
  --dry-run       check everything against the allocation and print the commands; start nothing
Site settings: slurm/site.sh, see slurm/site.example.sh. Guide: docs/slurm.md
TEXT
}

pretrain() { # default configuration, then the arguments of the batch script
    local config=$1 dry='' sweep='' overrides=()
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --config) config=${2:?--config needs a file}; shift 2 ;;
            --sweep) sweep=${2:?--sweep needs a file}; shift 2 ;;
            --dry-run) dry=1; shift ;;
            --help | -h) usage "slurm/${SLURM_JOB_NAME:-pretrain_7b.sh}" "$config"; exit 0 ;;
            --*) die "unknown option $1; see --help" ;;
            *=*) overrides+=("$1"); shift ;;
            *) die "unexpected argument $1; overrides are section.field=value" ;;
        esac
    done
    cd "$home"
    load_site
    export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    if [ -n "$dry" ] && [ -z "${SLURM_JOB_ID:-}" ]; then   # bash slurm/pretrain_7b.sh --dry-run, on the login node
        local script=slurm/${0##*/}
        exec "$python" -m launcher.submit "$config" "${overrides[@]}" --script "$script" --dry-run \
            --nodes "$(sed -n 's/^#SBATCH --nodes=//p' "$home/$script")"
    fi
    load_job

    local prepared run_dir snapshot limits=(${SWAX_SUPERVISE:-})
    local name=${job}_$restart attempt=0
    local sweep_point=${sweep:+$sweep:${SLURM_ARRAY_TASK_ID:-0}}
    say "start $restart on $nodes node(s): $SLURM_JOB_NODELIST"
    prepared=$("${here[@]}" "$python" -m launcher.batch prepare "$config" "${overrides[@]}" --nodes "$nodes" --home "$home" \
        --job "$job" --name "$name" ${sweep_point:+--sweep "$sweep_point"} ${dry:+--dry-run} "${limits[@]}") || exit $?
    IFS=$'\t' read -r run_dir snapshot <<<"$prepared"
    if [ -n "$dry" ]; then
        say "would train in $run_dir with the code and configuration of $snapshot:"
        printf 'srun --nodes=%s --ntasks-per-node=1 %s\n' "$nodes" \
            "$python -m launcher.run $snapshot/config.yaml --nodes $nodes --rendezvous $head:$port --name $name"
        exit 0
    fi
    cd "$snapshot"
    export PYTHONPATH=$snapshot${PYTHONPATH#"$home"}
    trap on_usr1 USR1
    trap on_term TERM

    while :; do
        local logs=$run_dir/logs/$name code=0 exclude=''
        mkdir -p "$logs"
        export_environment "$logs"
        if [ "${SWAX_PREFLIGHT:-1}" != 0 ]; then preflight "$logs"; fi
        if [ "$code" = 0 ] && [ -z "$time_is_up$told_by_slurm" ]; then
            say "training; logs of the ranks: $logs/rank_*.log"
            on_every_node "$python" -m launcher.run config.yaml --nodes "$nodes" --rendezvous "$head:$port" --name "$name" &
            await $!
        fi
        [ -z "$told_by_slurm" ] || { say "the ranks have ended ($code)"; exit "$code"; }

        local decision action ended delay reason
        decision=$("${here[@]}" "$python" -m launcher.batch decide --run-dir "$run_dir" --job "$job" --name "$name" --code "$code" \
            ${time_is_up:+--signalled} "${limits[@]}")
        IFS=$'\t' read -r action ended delay reason <<<"$decision"
        say "$action: $reason"
        case $action in
            finish | stop) exit "$ended" ;;
            requeue) requeue "$reason" "$exclude" || { say "Slurm refused to requeue this job"; exit "$ended"; } ;;
            restart)
                attempt=$((attempt + 1))
                name=${job}_$restart.$attempt
                [ "$delay" = 0 ] || { say "next start in $delay s"; sleep "$delay" & await $!; } ;;
            *) die "no decision on exit code $code" ;;
        esac
    done
}

preflight() { # folder of logs: sets code=77 and exclude=nodes where some are not fit
    say "checking $nodes node(s)"
    on_every_node "$python" -m launcher.preflight measure --reports "$1/preflight" --nodes "$nodes" --store "$head:$port" \
        --folder "$run_dir" --folder "$scratch" --timeout "${SWAX_PREFLIGHT_SECONDS:-120}" &
    await $!
    [ -z "$time_is_up$told_by_slurm" ] || return 0
    code=0
    exclude=$("${here[@]}" "$python" -m launcher.preflight judge --reports "$1/preflight" \
        --expect "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" ${SWAX_PREFLIGHT_LIMITS:-}) || code=$?
}
