#!/usr/bin/env bash
# tools/slurm_train.sh PARTITION JOB_NAME CONFIG [OPTIONS OF `vlmtune train`]
#
# GPUS=16 GPUS_PER_NODE=8 CPUS_PER_TASK=12 SRUN_ARGS='--time=8:00:00' tools/slurm_train.sh gpu finetune CONFIG
# MASTER_ADDR and MASTER_PORT come from the job, unless they are set. docs/several_gpus.md has a script for sbatch.
set -euo pipefail

if [ "$#" -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [options of vlmtune train]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
shift 3
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -r -a srun_args <<<"${SRUN_ARGS:-}"

exec srun \
    --partition "$partition" \
    --job-name "$job_name" \
    --gres "gpu:$gpus_per_node" \
    --ntasks "$gpus" \
    --ntasks-per-node "$gpus_per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    python -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
