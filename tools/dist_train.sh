#!/usr/bin/env bash
# tools/dist_train.sh CONFIG GPUS [OPTIONS OF `vlmtune train`]
#
# On each of several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a MASTER_PORT=29500 tools/dist_train.sh CONFIG 8
# NODE_RANK is 0 on MASTER_ADDR; the work dir has to be a folder that all nodes share.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [options of vlmtune train]" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2

# shutdown-timeout: a step and a save may take that long after Ctrl-C, SIGTERM or SIGUSR1, which are handed on
exec python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" \
    --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "$gpus" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout 7800 \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
