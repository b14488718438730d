#!/bin/bash
#SBATCH --job-name=tidali
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# Its authors have not run it on a cluster. Two minutes before the time
# limit Slurm sends SIGTERM: the run saves its state, mid-epoch, and the
# job is requeued. When it starts again, it resumes the run.
set -euo pipefail

DATA=${DATA:?a packed data set that every node sees}
RUN=${RUN:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
command=(train --data "$DATA" --res 224 --batch-size 1024 --out "$RUN")
if [[ -e "$RUN/state.safetensors" ]]; then
    command=(train --resume "$RUN")
fi

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" \
    -m tidali "${command[@]}" &
stop() {
    kill -TERM %1
    wait %1 || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop TERM
wait %1
