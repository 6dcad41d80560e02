# What differs between clusters, and nowhere else. Read where jobs are submitted and at the start of every attempt.

# Of sbatch. These count when a template is started with bash, which submits itself. Before a plain sbatch, read this file
# into the shell: . slurm/site.sh
#export SBATCH_PARTITION=train
#export SBATCH_ACCOUNT=project
#export SBATCH_QOS=normal
#export SBATCH_TIMELIMIT=1-00:00:00

# Modules and environment.
#module load cuda
: "${DLCM_PYTHON:=$PWD/.venv/bin/python}"
export DLCM_PYTHON

# A container: DLCM_PYTHON stays outside of it, for it speaks with SLURM, and needs no torch. The ranks may be started by
# any command that every node has, such as a script of one line, `exec apptainer exec --nv image.sif python "$@"`.
#export DLCM_RANK_PYTHON=$PWD/slurm/container.sh

# Interfaces. Without names the libraries choose; where they choose wrongly, ranks wait for each other in vain.
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# Name or address under which the others reach the first node; its host name where nothing is said.
#export DLCM_MASTER_ADDR=

# A cluster without GPUs, or one that claims GPUs which are not there.
#export DLCM_DEVICE=cpu

# Caches of kernels belong on a disk of the node.
export TRITON_CACHE_DIR="${TMPDIR:-/tmp}/triton-${SLURM_JOB_ID:-login}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ulimit -n "$(ulimit -H -n)" # shards, sockets and loader processes
