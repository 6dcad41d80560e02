#!/bin/bash
# The dense baseline of the paper: 1.3 B parameters, 1T tokens, 16 nodes of 8 GPUs.
#   bash slurm/dense_1t.sh [RUN_FILE] [field=value ...]      checks, takes a copy of the code, submits with slurm/site.sh
#   sbatch slurm/dense_1t.sh [RUN_FILE] [field=value ...]    the same, but the code is copied when the job first starts
# Numbers of nodes and GPUs are these, or those given to sbatch; nothing else repeats them.
#SBATCH --job-name=dense_1b_1t
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
CONFIG=configs/run/dense_1b_1t.yaml
. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/job.sh"
