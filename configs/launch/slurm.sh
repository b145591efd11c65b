#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# Runs a command of lex_fire on a Slurm cluster of GPUs, from a directory that all nodes share:
#
#   sbatch --nodes=4 configs/launch/slurm.sh lex_fire.train \
#     --config=configs/c4.py:size=base,encoding=fire --workdir=runs/fire
#
# One task a GPU, each of which sees all GPUs of its node: so JAX's detection of Slurm wants it, and so no
# --gpus-per-task (https://github.com/jax-ml/jax/issues/28194). For nodes of other than eight GPUs give
# --ntasks-per-node and --gres. Two minutes before its time is over the run is told, saves and ends; the
# same sbatch again goes on.
set -euo pipefail
: "${1:?a module with its flags}"
exec srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m "$@"
