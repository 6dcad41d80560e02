#!/bin/bash
# The validation table of a checkpoint, on one GPU. Arguments as of `dlcm evaluate`:
#   sbatch slurm/evaluate.sh runs/dlcm_2b_1t --step 20000 data.validation_rows=512
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=2:00:00
#SBATCH --output=slurm-%x-%j.out
set -eu
cd "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
. slurm/site.sh
exec "$DLCM_PYTHON" -m dlcm_lightning evaluate "$@"
