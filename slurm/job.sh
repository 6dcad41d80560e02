# What all templates that train have in common: sourced by them, from the top folder of the project.
# Arguments: [RUN_FILE] [field=value ...]. Inside an allocation it runs one attempt; elsewhere it submits the template, with
# options of sbatch where they come first (--nodes=2).
set -u
[ -f slurm/site.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
. slurm/site.sh
options=()
while [[ ${1-} == -* ]]; do options+=("--sbatch=$1") && shift; done
case ${1-} in '' | *=*) set -- "$CONFIG" "$@" ;; esac # the template's own run file
if [ -z "${SLURM_JOB_ID-}" ]; then
    exec "$DLCM_PYTHON" -m dlcm_lightning submit ${options[@]+"${options[@]}"} "$0" "$@"
fi
name=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
code=.jobs/${DLCM_JOB:-${name:-$SLURM_JOB_ID}}/code # of an earlier attempt, or of the submission
if [ -d "$code" ] && [ "${DLCM_JOB-}${SLURM_RESTART_COUNT:-0}" != 0 ]; then
    export PYTHONSAFEPATH=1 PYTHONPATH=$PWD/$code${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$DLCM_PYTHON" -m dlcm_lightning job "$@"
