#!/usr/bin/env bash
# Runs a command of lex_fire on all GPUs of this machine, again after each crash until it is done.
#
#   configs/launch/box.sh lex_fire.train \
#     --config=configs/c4.py:size=base,encoding=fire,mesh=8-gpus --workdir=runs/fire
#
# One process drives them all. A mistake (status 2, or 3: no room) and the end of the run end the script
# too; anything else, such as a driver's error, starts the command again, at most RESTARTS times, and
# training goes on from its newest checkpoint. SIGTERM and Ctrl-C make it save and end.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${1:?a module with its flags}"
left=${RESTARTS:-10} child=0 told=0
trap 'told=1; kill -TERM "$child" 2> /dev/null' TERM INT
while true; do
  "${PYTHON:-.venv/bin/python}" -m "$@" &
  child=$!
  # A trap ends `wait`, not what it waits for.
  while wait "$child"; status=$?; kill -0 "$child" 2> /dev/null; do :; done
  case $status in 0 | 2 | 3) exit "$status" ;; esac
  ((told || left-- == 0)) && exit "$status"
  echo "status $status; starting again, $left times more at most" >&2
  sleep "${PAUSE:-10}"
done
