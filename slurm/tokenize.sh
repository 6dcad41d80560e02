#!/bin/bash
# Texts to shards, the input files shared out over 16 tasks of an array. Arguments as of `dlcm tokenize`:
#   sbatch slurm/tokenize.sh /data/nemotron-cc --recipe data/sources/nemotron-cc.yaml --out data/built/paper \
#                            --tokenizer data/built/sample/deepseek
# A task that is requeued goes on where it stopped. When all are done, one task finishes the source:
#   sbatch --array=0 --dependency=afterok:JOB slurm/tokenize.sh merge data/built/paper --source nemotron-cc
#SBATCH --job-name=tokenize
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=64G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.out
set -eu
cd "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
. slurm/site.sh
if [ "$1" = merge ]; then
    shift
    exec "$DLCM_PYTHON" -m dlcm_lightning data merge "$@"
fi
exec "$DLCM_PYTHON" -m dlcm_lightning tokenize "$@" \
    --array "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
