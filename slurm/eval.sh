#!/bin/bash
# A checkpoint, a run or an export to scores, tables and plots, on one GPU. All options are those of `python -m swax_megatron.eval`, and --dry-run.
#   sbatch --gpus=1 slurm/eval.sh exports/swax_7b --out evaluations/swax_7b --tasks self-contained --lengths 4096,16384,65536
#   sbatch --gpus=1 --dependency=afterok:JOB slurm/eval.sh runs/swax_7b --out ...          after the training job
# Every (task, length) is kept as soon as it is done: a job that is requeued, or cut off by its time limit and submitted again, goes
# on there.
#SBATCH --job-name=swax_eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
home=${SWAX_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$home/slurm/common.sh" ] || { echo "error: submit from the project's folder, or set SWAX_HOME to it" >&2; exit 2; }
. "$home/slurm/common.sh"
cd "$home"
arguments=() dry=''
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry=1; else arguments+=("$argument"); fi
done
load_site
[ -n "$dry" ] || load_job
[ -n "$dry" ] || [ -n "${SLURM_JOB_GPUS:-}" ] || say "this job has no GPU and evaluates on the CPU; sbatch --gpus=1 gives it one"
run_one -m swax_megatron.eval "${arguments[@]}"
