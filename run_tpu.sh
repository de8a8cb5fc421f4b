#!/usr/bin/env bash
# run.sh for a TPU VM: the same modules and arguments, with the TPU's packages.
#
#   TFDS_DATA_DIR=gs://BUCKET/tensorflow_datasets bash run_tpu.sh train --config ... --workdir gs://...
#
# On a pod, run it on every worker at once; the variable belongs inside the command:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command="cd umd && TFDS_DATA_DIR=gs://... bash run_tpu.sh train --config ... --workdir gs://..."
#
# The workers find each other (docs/launching.md).
set -euo pipefail
export UMD_ACCELERATOR=tpu
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
