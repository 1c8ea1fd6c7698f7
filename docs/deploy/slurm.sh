#!/usr/bin/env bash
# Two nodes of eight GPUs under Slurm; from a folder that all nodes see:
#   sbatch docs/deploy/slurm.sh recipe.toml --set parallel.data=2 --set parallel.fsdp=8
#SBATCH --job-name=crosstile
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

recipe=${1:?the first argument is the recipe, a .toml file}
shift

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines 1)
export OMP_NUM_THREADS=8 TRITON_DEFAULT_FP_FUSION=1

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29500" \
    -m crosstile.bench.cli train --config "$recipe" --out "runs/$SLURM_JOB_NAME" --resume "$@"
