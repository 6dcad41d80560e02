#!/bin/bash
# The validation table of a checkpoint, on one GPU; or with --tasks its zero-shot scores, on all GPUs of the job.
# Arguments as of `dlcm evaluate`:
#   sbatch slurm/evaluate.sh runs/dlcm_2b_1t --step 20000 data.validation_rows=512
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 slurm/evaluate.sh runs/x --tasks paper12 --data-dir tasks
# Called again, it goes on where it was ended.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=2:00:00
#SBATCH --output=slurm-%x-%j.out
set -eu
cd "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
. slurm/site.sh
case " $* " in
    *" --tasks"[\ =]*)
        ranks=${SLURM_GPUS_ON_NODE:-1}
        exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * ranks))" --ntasks-per-node="$ranks" \
            --cpus-per-task="$((SLURM_CPUS_PER_TASK / ranks))" \
            --gpus-per-node="$ranks" --gpu-bind=none --kill-on-bad-exit=1 \
            "${DLCM_RANK_PYTHON:-$DLCM_PYTHON}" -m dlcm_lightning evaluate "$@"
        ;;
esac
exec "$DLCM_PYTHON" -m dlcm_lightning evaluate "$@"
