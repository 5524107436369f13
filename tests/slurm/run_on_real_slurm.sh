#!/bin/bash
# Runs a sweep of two points and a run of two hosts on a real SLURM, with this machine as its only node; Debian, as root:
#
#     tests/slurm/run_on_real_slurm.sh
#
# Installs slurm-wlm and munge, starts munged, slurmctld and slurmd with a separate configuration in a temporary folder,
# and queues the sweep. One of the jobs is pre-empted in the middle (SIGUSR2), queued again and resumed; then both points
# must be done. The second part runs scripts/cluster/slurm.sh with two tasks, which receive SIGTERM in the middle: both
# save the same step, and the job is queued again, resumes and completes.
set -euo pipefail
export PATH=$PATH:/usr/sbin
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d /tmp/retina_slurm.XXXXXX)
pids=()

stop() {
    status=$?
    [ $status -eq 0 ] || tail -n 20 "$work"/*.log "$work"/runs/slurm/*.err "$work"/runs/slurm/*.out 2>/dev/null || true
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait || true
    [ $status -ne 0 ] || rm -rf "$work"
    exit $status
}
trap stop EXIT

command -v slurmctld >/dev/null && command -v munged >/dev/null ||
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >"$work/apt.log" 2>&1

# munge authenticates messages; it gets a new key.
mkdir -p "$work/munge" "$work/ctld" "$work/d"
chmod 755 "$work"
head -c 1024 /dev/urandom >"$work/munge/key"
chmod 400 "$work/munge/key"
chmod 711 "$work/munge"
munged --foreground --force --key-file="$work/munge/key" --socket="$work/munge/socket" --pid-file="$work/munge/pid" \
    --seed-file="$work/munge/seed" --log-file="$work/munge.log" >"$work/munged.log" 2>&1 &
pids+=($!)

host=$(hostname -s)
cat >"$work/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$work/ctld
SlurmdSpoolDir=$work/d
SlurmctldPidFile=$work/ctld.pid
SlurmdPidFile=$work/d.pid
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
CONF
echo "CgroupAutomount=no" >"$work/cgroup.conf"
export SLURM_CONF="$work/slurm.conf"
slurmctld -D >"$work/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D >"$work/slurmd.log" 2>&1 &
pids+=($!)
for _ in $(seq 60); do sinfo -h -o %t 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo
sinfo -h -o %t | grep -q idle

cat >"$work/base.py" <<PY
from retina_jax.config import *

def get_config():
    return Config(
        data=DataConfig(source="scenes", batch_size=2, short_side=64, long_side=64, max_boxes=8,
            scenes=ScenesConfig(folder="$work/scenes", train_images=20, val_images=4, size=64, classes=3, max_side=30.0)),
        model=ModelConfig(backbone="resnet18", base_width=4, stage_blocks=(1, 1, 1, 1), norm="group", norm_groups=4,
            frozen_stages=0, max_level=5, fpn_channels=8, head_channels=8, head_convs=1),
        anchors=AnchorConfig(size_factor=2.0),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=4, boundaries=(9,), clip_norm=3.0),
        training=TrainingConfig(steps=60, log_every=1, eval_every=0, checkpoint_every=1, pictures=0, tensorboard=False),
        devices=1,
    )
PY
cat >"$work/two.py" <<PY
def get_sweep(base):
    return {"flipped": {}, "unflipped": {"data.flip": False}}
PY
sweep=("$python" scripts/sweep.py --sweep "$work/two.py" --base "$work/base.py" --workdir "$work/runs")
"${sweep[@]}" --launcher slurm --slurm timeout_min=20 slurm_partition=test slurm_array_parallelism=2 | tee "$work/output.txt"
job=$(grep -o 'job [0-9]*_0' "$work/output.txt" | cut -d' ' -f2)

# Once its first point has saved a step, the first job is pre-empted.
for _ in $(seq 300); do ls "$work"/runs/base-*/checkpoints 2>/dev/null | grep -qE '^[0-9]+$' && break; sleep 0.2; done
scancel --signal=USR2 "$job"
for _ in $(seq 900); do [ -z "$(squeue -h)" ] && break; sleep 1; done

"${sweep[@]}" --list | tee "$work/list.txt"
grep -q "2 distinct runs: 2 done" "$work/list.txt"
grep -h "resuming" "$work"/runs/slurm/*_log.out

# Two hosts of two CPU devices each, found by JAX through SLURM.
run="$work/hosts"
sed -i -e 's/batch_size=2/batch_size=8/' -e 's/steps=60/steps=400/' -e 's/checkpoint_every=1,/checkpoint_every=20,/' \
    -e '/devices=1/d' "$work/base.py"
export PYTHON="$python" JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2
job=$(sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --time=30 --partition=test \
    --output="$work/hosts.log" scripts/cluster/slurm.sh "$run" --config "$work/base.py")
for _ in $(seq 600); do [ -d "$run/checkpoints/40" ] && break; sleep 0.2; done
scancel --signal=TERM "$job.0"
for _ in $(seq 900); do [ -z "$(squeue -h)" ] && break; sleep 1; done
grep -E "stopped by SIGTERM|resuming|everything is in" "$work/hosts.log"
grep -q "resuming $run at step" "$work/hosts.log" && test -f "$run/summary.json"
echo "passed on $(sinfo --version), submitit $("$python" -c 'import submitit; print(submitit.__version__)'), $(. /etc/os-release; echo "$PRETTY_NAME")"
