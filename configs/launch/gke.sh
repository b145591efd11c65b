#!/usr/bin/env bash
# Runs a command of lex_fire on slices of a GKE cluster, by XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=NAME ZONE=us-west4-a PROJECT=MINE TYPE=v5litepod-256 SLICES=2 RUN=fire-large \
#     configs/launch/gke.sh lex_fire.train \
#     --config=configs/c4.py:size=large,encoding=fire,mesh=two-slices-v5e-256 --workdir=gs://BUCKET/runs/fire-large \
#     --config.data.tfds_directory=gs://BUCKET/tfds --config.data.streaming=true
#
# A container's disk goes with it: so training reads the Task as it goes, and each start prepares the stream of
# validation alone. Such a run goes on on as many hosts as it had.
# XPK lays this checkout over IMAGE, any with Python 3.11 or newer; requirements are installed as each
# host starts, so for many hosts use an image that has them. Hosts find each other by GKE's own
# variables. A host that dies ends the run on all of them, and RESTARTS times it begins again and goes on
# from its newest checkpoint; GRACE seconds are for the save when a slice is taken away.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CLUSTER:?the name of the cluster}" "${ZONE:?its zone}" "${PROJECT:?its project}"
: "${TYPE:?of the slices, as v5litepod-256}" "${RUN:?a name for the run}" "${1:?a module with its flags}"
printf -v command ' %q' "$@"
exec xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" --workload="$RUN" \
  --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --max-restarts="${RESTARTS:-10}" \
  --termination-grace-period-seconds="${GRACE:-120}" \
  --base-docker-image="${IMAGE:-python:3.12}" --script-dir=. \
  --command="pip install --quiet -r requirements-gcs.txt 'jax[tpu]' && exec python -m$command"
