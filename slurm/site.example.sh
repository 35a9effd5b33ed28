# Settings of this cluster. Copy to slurm/site.sh and edit; every line is optional but SWAX_SCRATCH.
# Sourced on the login node (`. slurm/site.sh` before sbatch; launcher.submit does it) and at the start of every job.
# No secrets here: the file is copied into every run directory.

# ---- queue: sbatch reads these from the environment --------------------------------------------------------------------------
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project42
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100
# export SBATCH_GPUS_PER_NODE=8         # or h100:8; where --exclusive alone does not give a job the node's GPUs

# ---- software: modules, then an environment, or a container ------------------------------------------------------------------
# export SWAX_MODULES="gcc/13 cuda/12.8"
# export SWAX_VENV=$HOME/swax/.venv
# export SWAX_CONTAINER=/shared/images/swax.sqsh
# export SWAX_CONTAINER_RUNTIME=pyxis   # or apptainer
# export SWAX_CONTAINER_MOUNTS=/shared:/shared

# ---- disks -------------------------------------------------------------------------------------------------------------------
export SWAX_SCRATCH=/tmp                # a folder on every node's own disk: compiled kernels are cached there

# ---- network -----------------------------------------------------------------------------------------------------------------
# export SWAX_INTERFACE=ib0             # for NCCL's and Gloo's sockets; several: ib0,ib1; a prefix matches
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO                # files run_dir/logs/<start>/nccl_<host>_<pid>.log

# ---- checks before training (python -m launcher.preflight judge --help) ------------------------------------------------------
# export SWAX_PREFLIGHT=0               # leave them out
# export SWAX_PREFLIGHT_SECONDS=120      # how long nodes wait for each other
# export SWAX_PREFLIGHT_LIMITS="--min-gpus 8 --min-matmul 400 --min-bandwidth 20 --min-disk 20"
# export SWAX_NODE_CHECK=/usr/sbin/nhc  # the site's own: any exit code but 0 makes a node unfit

# ---- restarts (python -m launcher.supervise --help) --------------------------------------------------------------------------
# export SWAX_SUPERVISE="--restarts 100 --patience 3 --delay 10"
