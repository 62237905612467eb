#!/bin/bash
#SBATCH --job-name=refinelib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120

# One launcher on each host, four processes under each; all hosts see the folder of the runs.
# 120 seconds before the job's time is over Slurm sends SIGTERM: the run stops with a checkpoint,
# and the same script with `-p resume true` goes on.
set -eu
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 4 --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  -m refinelib train -f params/best.yaml -p data coco -p data_dir "$DATA_DIR" "$@"
