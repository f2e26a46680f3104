#!/bin/bash
# PROJECT=my-project ZONE=us-west4-a SHARE=10.0.0.2:/share stages/cluster/tpu.sh
set -u
tpu() { gcloud compute tpus tpu-vm "$1" thrice --project="$PROJECT" --zone="$ZONE" "${@:2}"; }
state() { tpu describe --format='value(state)' 2>/dev/null; }
remote="
sudo mkdir -p /shared && { mountpoint -q /shared || sudo mount -t nfs $SHARE /shared; } && cd /shared/thrice || exit 2
pip install --quiet uv; export PATH=\$HOME/.local/bin:\$PATH UV_PROJECT_ENVIRONMENT=\$HOME/venv
for start in {1..100}; do
  uv run --extra tpu python -m stages.train llama-3.2-1b --mesh fsdp=64 --data corpus.bin --steps 20000 --out-dir runs/llama
  code=\$?; [[ \$code =~ ^(75|134|137)$ ]] || break
done; exit \$code"
while true; do
  [[ $(state) ]] || tpu create --spot --accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite || exit
  tpu ssh --worker=all --command="$remote"
  code=$?
  [[ $code == 0 || $(state) == READY ]] && break # done, or an error that is not a preemption
  tpu delete --quiet
done
tpu delete --quiet
exit $code
