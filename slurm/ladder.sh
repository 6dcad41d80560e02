#!/bin/bash
# The paper's ladder, one size a task, one node of 8 GPUs each.
#   sbatch slurm/ladder.sh [field=value ...]    the code is copied when a task first starts
#SBATCH --job-name=ladder
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.out
: "${SLURM_JOB_ID:?submit it with sbatch}"
SIZES=(87m 274m 468m 833m)
CONFIG=configs/run/ladder_${SIZES[$SLURM_ARRAY_TASK_ID]}.yaml
. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/job.sh"
