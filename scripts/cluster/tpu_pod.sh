#!/bin/bash
# Trains on all hosts of a Cloud TPU slice, and restarts the run until it is complete. Start it on a machine that stays on:
#
#     scripts/cluster/tpu_pod.sh TPU ZONE RUN --config configs/paper_r50_600.py [--loss.gamma 5 ...]
#
# On every host, ~/retina_jax must be the checkout, set up by `make setup ACCELERATOR=tpu`, and RUN must be in a folder that
# all hosts mount, for example Filestore; a Cloud Storage bucket has neither locks nor renames.
set -uo pipefail
[ $# -ge 3 ] || { echo "usage: $0 TPU ZONE RUN [options of scripts/train.py]" >&2; exit 2; }
tpu=$1 zone=$2 run=$3
shift 3

on() { # on WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker="$1" --command="cd retina_jax && $2"
}
printf -v train '%q ' .venv/bin/python scripts/train.py --workdir "$run" --distributed "$@"
printf -v complete 'test -f %q' "$run/summary.json"

for _ in $(seq 20); do
    on 0 "$complete" && exit 0
    began=$SECONDS
    if ! on all "$train" && [ $((SECONDS - began)) -lt "${AT_ONCE:-300}" ]; then
        on 0 "$complete" && exit 0
        echo "error: $run ended within minutes of its start, so it is not restarted; see its log" >&2
        exit 1
    fi
done
on 0 "$complete"
