#!/usr/bin/env bash
# A Cloud TPU slice without Kubernetes: make it, install on every host, train, and delete it.
#   PROJECT=... ZONE=us-west4-a docs/deploy/tpu-slice.sh recipe.toml
set -euo pipefail

recipe=${1:?the argument is the recipe, a .toml file}
name=${NAME:-crosstile}
zone=${ZONE:?the zone of the TPU}
project=${PROJECT:?the project that pays}
type=${TYPE:-v5litepod-16}
version=${VERSION:-v2-alpha-tpuv5-lite}
runs=${RUNS:-gs://$project-runs/$name}
here=(--project "$project" --zone "$zone")

gcloud compute tpus tpu-vm create "$name" "${here[@]}" --accelerator-type "$type" --version "$version"
trap 'gcloud compute tpus tpu-vm delete "$name" "${here[@]}" --quiet' EXIT

git archive --format tar.gz --output crosstile.tar.gz HEAD
gcloud compute tpus tpu-vm scp crosstile.tar.gz "$recipe" "$name:" "${here[@]}" --worker all
gcloud compute tpus tpu-vm ssh "$name" "${here[@]}" --worker all --command '
    mkdir -p crosstile && tar -xzf crosstile.tar.gz -C crosstile
    python3 -m pip install "./crosstile[tpu,jax,models,train]"'
gcloud compute tpus tpu-vm ssh "$name" "${here[@]}" --worker all --command "
    python3 -m crosstile.bench.cli train --framework jax --config '$(basename "$recipe")' --out '$runs' --resume"
