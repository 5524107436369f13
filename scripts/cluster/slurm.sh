#!/bin/bash
# Trains on several nodes under SLURM, and queues itself again until the run is complete. Submit it from the checkout:
#
#     sbatch --nodes=2 scripts/cluster/slurm.sh RUN --config configs/paper_r50_600.py [--loss.gamma 5 ...]
#
#SBATCH --job-name=retina_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# One task per GPU: under SLURM, JAX gives each process the GPU with the number of its task on the node.
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# The tasks receive SIGTERM 300 s before the time limit, and save; with B:TERM only this shell would receive it.
#SBATCH --signal=TERM@300
# SLURM itself queues a job again that is pre-empted or loses a node; its output is appended to the same file.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=retina_jax_%j.log
set -uo pipefail
run=${1:?usage: sbatch [--nodes=N ...] scripts/cluster/slurm.sh RUN [options of scripts/train.py]}
shift
[ -f "$run/summary.json" ] && exit 0

trap : TERM                                           # this shell waits for its tasks, also after SIGTERM to all
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # srun does not read this from the job
srun --wait=300 "${PYTHON:-.venv/bin/python}" scripts/train.py --workdir "$run" --distributed "$@"
status=$?
[ -f "$run/summary.json" ] && exit 0

# 0: saved after SIGTERM. 75, 134: another host was lost. 137, 143: killed. A person must look at any other status.
case $status in 0 | 75 | 134 | 137 | 143) ;; *) exit "$status" ;; esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
    echo "error: $run is not complete after 20 restarts; see its log" >&2
    exit 1
fi
scontrol requeue "$SLURM_JOB_ID"
