#!/bin/sh
# Starts one of the vLLM servers that the guard speaks to. The first two serve the same model.
#
#   deploy/vllm.sh propose MODEL PORT [options of vllm serve]     the tokens
#   deploy/vllm.sh latents MODEL PORT [options of vllm serve]     the hidden states, for a critic
#   deploy/vllm.sh score MODEL PORT [options of vllm serve]       a classifier's logits, for a reward or cost model
#
# MODEL is a directory or a name of the hub. VLLM_PYTHON is the Python that has vllm; HOST the address to listen on.
set -eu
if [ $# -lt 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
role=$1 model=$2 port=$3
shift 3
case $role in
  propose) set -- --enable-prefix-caching "$@" ;;
  # LAST: the state of the last token; no activation: as the model has it, not of length 1.
  latents) set -- --runner pooling --convert embed \
    --pooler-config '{"pooling_type": "LAST", "use_activation": false}' "$@" ;;
  score) set -- --runner pooling --convert classify --pooler-config '{"use_activation": false}' "$@" ;;
  *) echo "$0: propose, latents or score, not $role" >&2; exit 2 ;;
esac
# The module and not the script: the CPU wheel's script looks for a package by the name of vllm and fails.
exec "${VLLM_PYTHON:-python3}" -m vllm.entrypoints.openai.api_server \
  --model "$model" --host "${HOST:-127.0.0.1}" --port "$port" --disable-uvicorn-access-log "$@"
