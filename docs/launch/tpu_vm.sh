#!/bin/bash
# A TPU slice: bash docs/launch/tpu_vm.sh        (with gcloud; the slice and a bucket exist)
# The same command runs on every host of the slice; JAX finds the other hosts through TPU metadata.
# Run it again after a preemption: the run continues from the last checkpoint.
set -euo pipefail

# The one line to change: the slice, its zone, the bucket, what is trained.
TPU=lightwam-v5e-16 ZONE=us-west4-a BUCKET=my-bucket TRAIN="--config configs/libero.py:spatial --config.train.init=data/weights/wan21 --config.train.batch_size=1024 --config.mesh.fsdp=8 --config.optimizer.accum_steps=4 --config.model.remat=full"

# The bucket is mounted because the caches have to be in a directory that all hosts share. For the run, an
# address does too (--workdir gs://..., docs/pods.md).
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
  set -e
  cd lightwam-jax
  mkdir -p data runs
  mountpoint -q runs || gcsfuse --implicit-dirs --rename-dir-limit=100000 --only-dir runs '$BUCKET' runs
  mountpoint -q data || gcsfuse --implicit-dirs --only-dir data -o ro '$BUCKET' data
  python3 train.py $TRAIN --workdir runs/spatial"
