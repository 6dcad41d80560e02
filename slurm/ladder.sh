#!/bin/bash
# Runs of a study, or the paper's ladder: one run file a task, one node of 8 GPUs each. The code is copied when a task first
# starts; a task that is requeued goes on where it stopped, and one whose run is finished ends at once.
#   dlcm ladder run STUDY.yaml --write                                     writes run files, and says the next line
#   sbatch --array=0-39 slurm/ladder.sh LIST.txt [field=value ...]         a task for each line, a run file, of LIST.txt
#   sbatch slurm/ladder.sh [field=value ...]                               configs/run/ladder_*.yaml, a size a task
# Studies of runs that need one GPU or none take a task for many runs instead: dlcm ladder run STUDY.yaml inside an array.
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
cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 2
FILES=(configs/run/ladder_{87m,274m,468m,833m}.yaml)
if [ -d "${1-}" ]; then
    echo "$1 is a folder: give a list of run files, as dlcm ladder run STUDY.yaml --write makes it" >&2
    exit 2
elif [[ ${1-} == *.txt ]]; then
    mapfile -t FILES < "$1" || exit 2
    shift
fi
CONFIG=${FILES[$SLURM_ARRAY_TASK_ID]-} # unless a run file is named, as by the job that follows one which was not requeued
if [ -z "$CONFIG" ]; then
    echo "task $SLURM_ARRAY_TASK_ID: there are ${#FILES[@]} run files, counted from 0; --array=0-$((${#FILES[@]} - 1))" >&2
    exit 2
fi
. slurm/job.sh
