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
export TORCHINDUCTOR_CACHE_DIR="${TMPDIR:-/tmp}/inductor-${SLURM_JOB_ID:-login}"

# The number of concepts changes with every batch, and the sizes of buffers with it.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# How NCCL adds up decides the last bits of a sum: one algorithm, one protocol, and no sums in the switch. The order of
# the ring follows the nodes that a job is given, so the same bits need the same nodes, or nodes wired alike. Who does
# not need them comments these out.
export NCCL_ALGO="${NCCL_ALGO:-Ring}" NCCL_PROTO="${NCCL_PROTO:-Simple}" NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ulimit -n "$(ulimit -H -n)" # shards, sockets and loader processes
