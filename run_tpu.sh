#!/usr/bin/env bash
# run.sh for a TPU VM: the same modules and arguments, with the TPU's packages.
#
#   TFDS_DATA_DIR=gs://BUCKET/tensorflow_datasets bash run_tpu.sh train --config ... --workdir gs://...
#
# On a pod, run it on every worker:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command="cd umd && bash run_tpu.sh train --config ... --workdir gs://..."
set -euo pipefail
export UMD_ACCELERATOR=tpu
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
