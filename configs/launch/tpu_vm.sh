#!/usr/bin/env bash
# Runs a command of lex_fire on every host of a Cloud TPU slice, from your own machine.
#
#   TPU=NAME ZONE=us-west4-a PROJECT=MINE configs/launch/tpu_vm.sh install
#   TPU=NAME ZONE=us-west4-a PROJECT=MINE configs/launch/tpu_vm.sh lex_fire.train \
#     --config=configs/c4.py:size=base,encoding=fire,mesh=v5e-256 --workdir=gs://BUCKET/runs/fire \
#     --config.data.tfds_directory=gs://BUCKET/tfds --config.data.directory=/mnt/streams
#
# `install` copies the last commit to all hosts and makes an environment there: again after each change.
# They need Python 3.11 or newer: PYTHON=python3.12 names it.
# The hosts find each other by the slice's metadata. A command whose connection breaks goes on: it runs
# in a session of its own, its lines are in ~/lex_fire.log of each host, and `log` follows the first's.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}" "${PROJECT:?its project}"
: "${1:?install, log, stop, or a module with its flags}"
on() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --project="$PROJECT" --worker="$1" --command="$2"; }

case "$1" in
  install)
    git archive --format=tar.gz --prefix=lex_fire_checkout/ HEAD > /tmp/lex_fire.$$.tar.gz
    gcloud compute tpus tpu-vm scp "/tmp/lex_fire.$$.tar.gz" "$TPU:lex_fire.tar.gz" \
      --zone="$ZONE" --project="$PROJECT" --worker=all
    rm "/tmp/lex_fire.$$.tar.gz"
    on all 'tar xzf lex_fire.tar.gz && cd lex_fire_checkout && '"${PYTHON:-python3}"' -m venv .venv &&
      .venv/bin/pip install --quiet -r requirements-gcs.txt "jax[tpu]"'
    ;;
  log) on 0 'tail -n 50 -F lex_fire.log' ;;
  # SIGTERM, on which training saves; of several hosts each tells the others.
  stop) on all 'pkill -TERM -f "python -m lex_fire"' ;;
  *)
    printf -v command ' %q' "$@"
    # All three streams elsewhere, or the connection would last as long as the command.
    on all "cd lex_fire_checkout || exit; setsid .venv/bin/python -m$command < /dev/null > ~/lex_fire.log 2>&1 &"
    on 0 'tail -n +1 -F lex_fire.log'
    ;;
esac
