#!/bin/bash
# Pretrain configs/swax_1p4b.yaml, or any other configuration with --config. See docs/slurm.md.
#   sbatch slurm/pretrain_1p4b.sh --config configs/demo.yaml train.steps=50
#   sbatch --nodes=16 --time=12:00:00 slurm/pretrain_1p4b.sh
# Whole nodes with all their CPUs and GPUs. Partition, account and constraints: SBATCH_* of slurm/site.sh, or the command line.
#SBATCH --job-name=swax_1p4b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --wait-all-nodes=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# seconds before the time limit at which the ranks are told to save: more than a step and a save
#SBATCH --signal=B:USR1@600
set -euo pipefail
home=${SWAX_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$home/slurm/common.sh" ] || { echo "error: submit from the project's folder, or set SWAX_HOME to it" >&2; exit 2; }
. "$home/slurm/common.sh"
pretrain configs/swax_1p4b.yaml "$@"
