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
left=${RESTARTS:-10} child='' told=0 status=143
trap 'told=1; [[ -n $child ]] && kill -TERM "$child" 2> /dev/null' TERM INT
# Waits for a command in the background: a trap ends `wait`, not what it waits for, and may have come
# before there was anyone to tell.
finish() {
  ((told)) && kill -TERM "$child" 2> /dev/null
  while wait "$child"; status=$?; kill -0 "$child" 2> /dev/null; do :; done
}

while ! ((told)); do
  "${PYTHON:-.venv/bin/python}" -m "$@" &
  child=$!
  finish
  case $status in 0 | 2 | 3) exit "$status" ;; esac
  ((told || left-- == 0)) && exit "$status"
  echo "status $status; starting again, $left times more at most" >&2
  failed=$status
  sleep "${PAUSE:-10}" &
  child=$!
  finish
  status=$failed
done
exit "$status"
