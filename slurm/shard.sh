#!/bin/bash
# Text to shards on several nodes: an array job, one part of the corpus a task, then one job that joins the parts.
#   job=$(sbatch --parsable --array=1-16 slurm/shard.sh --input corpus/ --tokenizer work/tokenizer.model --out data/web)
#   sbatch --dependency=afterok:$job slurm/shard.sh --input corpus/ --tokenizer work/tokenizer.model --out data/web --merge
# Without --array one node does it all. A task that is requeued, or submitted again, goes on where it was; to repeat some of the
# tasks say how many parts there were: SWAX_PARTS=16 sbatch --array=3,7 ... All options are data_prep/shard.py's, and --dry-run.
#SBATCH --job-name=swax_shard
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail
home=${SWAX_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$home/slurm/common.sh" ] || { echo "error: submit from the project's folder, or set SWAX_HOME to it" >&2; exit 2; }
. "$home/slurm/common.sh"
cd "$home"
arguments=() dry='' merge=''
for argument in "$@"; do
    case $argument in
        --dry-run) dry=1 ;;
        --merge) merge=1; arguments+=(--merge) ;;
        *) arguments+=("$argument") ;;
    esac
done
load_site
[ -n "$dry" ] || load_job
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    [ -z "$merge" ] || die "--merge joins the parts once, in a job without --array"
    parts=${SWAX_PARTS:-$SLURM_ARRAY_TASK_MAX}
    [ "$SLURM_ARRAY_TASK_ID" -ge 1 ] && [ "$SLURM_ARRAY_TASK_ID" -le "$parts" ] || die "part $SLURM_ARRAY_TASK_ID of $parts: use --array=1-$parts"
    arguments+=(--part "$SLURM_ARRAY_TASK_ID/$parts")
fi
run_one data_prep/shard.py --workers "${SLURM_CPUS_PER_TASK:-4}" "${arguments[@]}"
