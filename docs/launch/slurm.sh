#!/bin/bash
# GPUs under SLURM: sbatch docs/launch/slurm.sh        (from the repository; .venv made by make setup)
# One process per GPU; JAX finds the other processes through SLURM's variables. After the time limit
# or a preemption the job is queued again and continues from the saved step; an error ends it.
#SBATCH --job-name=lightwam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -u

# The one line to change: what is trained, and a directory that all nodes share.
TRAIN=(--config "configs/libero.py:spatial" --workdir "runs/spatial" --config.train.init=weights/wan21 --config.mesh.fsdp=8)

srun --kill-on-bad-exit=1 .venv/bin/python train.py "${TRAIN[@]}"
code=$?
# 143: stopped by SIGTERM, after saving. Any other code but 0 is an error and is not retried.
if [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
