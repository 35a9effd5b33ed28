# Sourced by the batch scripts. Topology comes from SLURM_* alone, everything of a site from slurm/site.sh.
# `home` is the project's folder. Exit codes: docs/slurm.md.
set -euo pipefail

say() { printf '%s [job %s] %s\n' "$(date '+%F %T')" "${SLURM_JOB_ID:-none}" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# ---- the site: modules, environment, container, scratch, network -------------------------------------------------------------
load_site() {
    local site=${SWAX_SITE:-$home/slurm/site.sh}
    set +u   # what a site, its modules and an environment's activate do with unset variables is theirs
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
    set -u
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
            here=(srun --nodes=1 --ntasks=1 --overlap ${SLURM_GPUS_ON_NODE:+--gres=gpu:"$SLURM_GPUS_ON_NODE"} "${step[@]}") ;;
        *) die "SWAX_CONTAINER_RUNTIME=$SWAX_CONTAINER_RUNTIME: must be pyxis or apptainer" ;;
    esac
}

# ---- the job: who and where we are -------------------------------------------------------------------------------------------
load_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || die "this is a batch script: submit it with sbatch, or look first with --dry-run"
    nodes=$SLURM_JOB_NUM_NODES
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    head=${head%%$'\n'*}   # not by `head`: with many nodes its early end would be a broken pipe, and the job's
    port=$((10000 + SLURM_JOB_ID % 20000))   # below the ephemeral ports
    restart=${SLURM_RESTART_COUNT:-0}
    job=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}-$SLURM_ARRAY_TASK_ID
    slurm_id=${job/-/_}   # a task of an array may bear the number of the whole array
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
    # how long an agent lets its ranks save after a signal; Slurm's own limits (KillWait, the time limit) come before that
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
}

together=(--kill-on-bad-exit=1)   # how the tasks of a step end: one that fails ends the others
on_every_node() { # command: one task a node, all CPUs of the node
    # a step of an --exclusive job that asked for no GPUs gets none of those it has, unless it asks
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --distribution=block \
        ${SLURM_GPUS_ON_NODE:+--gres=gpu:"$SLURM_GPUS_ON_NODE"} "${together[@]}" --unbuffered "${step[@]}" "${inside[@]}" "$@"
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
    [ -z "${slurm_id:-}" ] || scancel --signal=USR1 "$slurm_id" || true
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

doze() { # whole seconds: sleep, unless a signal has come or comes; one may come before a `wait` begins, so none is long
    local left=$1
    while [ "$left" -gt 0 ] && [ -z "$time_is_up$told_by_slurm" ]; do
        sleep 1 &
        wait $! || true
        left=$((left - 1))
    done
}

requeue() { # reason, nodes to leave out (may be empty)
    say "requeue: $1${2:+; leaving out $2}"
    trap '' TERM USR1   # Slurm ends this script now
    if [ -z "$2" ]; then
        scontrol requeue "$slurm_id" || return 1
    else
        # an exclusion can be set while a job is pending: hold, exclude, release, before Slurm's SIGKILL comes
        local known   # the user's --exclude, and what was excluded before
        known=$(scontrol -o show job "$slurm_id" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p') ||
            say "the nodes that are excluded already are not known"
        [ "$known" != "(null)" ] || known=''
        scontrol requeuehold "$slurm_id" || return 1
        scontrol update JobId="$slurm_id" ExcNodeList="${known:+$known,}$2" || say "could not exclude $2"
        scontrol release "$slurm_id" || { sleep 2; scontrol release "$slurm_id"; } ||
            say "could not release this job, it stays held until you do: scontrol release $slurm_id"
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
    trap on_usr1 USR1   # from the first line on: a signal that nobody handles ends this script, and nothing is requeued
    trap on_term TERM
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
    local outer=${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH=$home$outer
    if [ -n "$dry" ] && [ -z "${SLURM_JOB_ID:-}" ]; then   # bash slurm/pretrain_7b.sh --dry-run, on the login node
        local script=slurm/${0##*/}
        exec "$python" -m launcher.submit "$config" "${overrides[@]}" --script "$script" --dry-run \
            --nodes "$(sed -n 's/^#SBATCH --nodes=//p' "$home/$script")"
    fi
    load_job

    local prepared run_dir snapshot next limits=(${SWAX_SUPERVISE:-})
    local name=${job}_$restart attempt=0
    local sweep_point=${sweep:+$sweep:${SLURM_ARRAY_TASK_ID:-0}}
    say "start $restart on $nodes node(s): $SLURM_JOB_NODELIST"
    if [ "$restart" -gt 0 ]; then   # what was submitted, not what the checkout and the YAML have become since
        snapshot=$(squeue -h -j "$slurm_id" -o %k) || say "squeue does not tell this job's comment"
        snapshot=${snapshot#swax:}/snapshots/$job
        if [ -f "$snapshot/config.yaml" ]; then
            say "going on with the code and the configuration of $snapshot"
            config=$snapshot/config.yaml overrides=() sweep_point=''
            cd "$snapshot"
            export PYTHONPATH=$snapshot$outer
        else
            say "no earlier start of this job came as far as a snapshot: reading $config"
        fi
    fi
    prepared=$("${here[@]}" "$python" -m launcher.batch prepare "$config" "${overrides[@]}" --nodes "$nodes" --home "$home" \
        --job "$job" --name "$name" ${sweep_point:+--sweep "$sweep_point"} ${dry:+--dry-run} "${limits[@]}") || exit $?
    IFS=$'\t' read -r run_dir snapshot <<<"$prepared"
    if [ -n "$dry" ]; then
        say "would train in $run_dir with the code and configuration of $snapshot:"
        printf 'srun --nodes=%s --ntasks-per-node=1 %s\n' "$nodes" \
            "$python -m launcher.run $snapshot/config.yaml --nodes $nodes --rendezvous $head:$port --name $name"
        exit 0
    fi
    scontrol update JobId="$slurm_id" Comment="swax:$run_dir" || say "could not note the run directory in the job's comment"
    cd "$snapshot"
    export PYTHONPATH=$snapshot$outer

    while :; do
        local logs=$run_dir/logs/$name code=0 exclude=''
        mkdir -p "$logs"
        export_environment "$logs"
        if [ "${SWAX_PREFLIGHT:-1}" != 0 ] && [ -z "$time_is_up$told_by_slurm" ]; then preflight "$logs"; fi
        if [ -n "$time_is_up$told_by_slurm" ]; then
            code=75   # told to stop before there was anything to save
        elif [ "$code" = 0 ]; then
            say "training; logs of the ranks: $logs/rank_*.log"
            on_every_node "$python" -m launcher.run config.yaml --nodes "$nodes" --rendezvous "$head:$port" --name "$name" &
            await $!
        fi
        [ -z "$told_by_slurm" ] || { say "the ranks have ended ($code)"; exit "$code"; }

        local decision action ended delay reason
        next=${job}_$restart.$((attempt + 1))
        decision=$("${here[@]}" "$python" -m launcher.batch decide --run-dir "$run_dir" --job "$job" --name "$name" --next "$next" \
            --code "$code" ${time_is_up:+--signalled} "${limits[@]}")
        IFS=$'\t' read -r action ended delay reason <<<"$decision"
        say "$action: $reason"
        case $action in
            finish | stop) exit "$ended" ;;
            requeue) requeue "$reason" "$exclude" || { say "Slurm refused to requeue this job"; exit "$ended"; } ;;
            restart)
                attempt=$((attempt + 1)) name=$next
                if [ "$delay" != 0 ]; then
                    say "next start in $delay s"
                    doze "$delay"
                    [ -z "$told_by_slurm" ] || exit 75
                    if [ -n "$time_is_up" ]; then requeue "the time of this allocation is over" '' || exit 75; fi
                    "${here[@]}" "$python" -m launcher.batch begin --run-dir "$run_dir" --job "$job" --name "$name"
                fi ;;
            *) die "no decision on exit code $code" ;;
        esac
    done
}

preflight() { # folder of logs: sets code=77 and exclude=nodes where some are not fit
    # one that fails leaves the others their time to report; none may hang for ever: past its own budget Slurm ends the step
    local seconds=${SWAX_PREFLIGHT_SECONDS:-120}
    local together=(--kill-on-bad-exit=0 --wait=0 --time=$((6 * ${seconds%.*} / 60 + 5)))
    say "checking $nodes node(s)"
    on_every_node "$python" -m launcher.preflight measure --reports "$1/preflight" --nodes "$nodes" --store "$head:$port" \
        --folder "$run_dir" --folder "$scratch" --timeout "$seconds" &
    await $!
    [ -z "$time_is_up$told_by_slurm" ] || return 0
    code=0
    exclude=$("${here[@]}" "$python" -m launcher.preflight judge --reports "$1/preflight" \
        --expect "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" ${SWAX_PREFLIGHT_LIMITS:-}) || code=$?
}
