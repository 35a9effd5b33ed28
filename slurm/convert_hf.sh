#!/bin/bash
# A checkpoint to a folder that transformers loads. All options are those of `python -m swax_megatron.hf.export`, and --dry-run.
#   sbatch slurm/convert_hf.sh --checkpoint runs/swax_7b --out exports/swax_7b --dtype bf16
#   sbatch --dependency=afterok:JOB slurm/convert_hf.sh ...          after the training job
#SBATCH --job-name=swax_export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=2:00:00
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
run_one -m swax_megatron.hf.export "${arguments[@]}"
