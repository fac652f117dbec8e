#!/usr/bin/env bash
# Runs every example here whose program is installed, against a server that it starts itself:
#   examples/run_all.sh [directory of the environment with lm_eval and inspect]
# `inferenceguard`, and python with `openai`, are taken from the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
tools="${1:+$1/bin/}"
port="${PORT:-8123}"
url="http://127.0.0.1:$port/v1"
work="$(mktemp -d)"
inferenceguard serve --preset embedded --port "$port" --n-beams 4 2> "$work/server.log" &
server=$!
trap 'kill "$server" 2> /dev/null; wait "$server" || true; rm -rf "$work"' EXIT
until python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/readyz')" 2> /dev/null; do
  kill -0 "$server" || { cat "$work/server.log"; exit 1; }
  sleep 1
done

echo "== openai"
python examples/openai_client.py "$url"

if command -v "${tools}lm_eval" > /dev/null; then
  export HF_HOME="$work/hf" HF_DATASETS_OFFLINE=1 OPENAI_API_KEY=none
  echo "== lm-eval, chat"
  "${tools}lm_eval" run --model local-chat-completions --include_path examples/lm_eval --tasks guarded_facts \
    --apply_chat_template --model_args "model=embedded,base_url=$url/chat/completions,num_concurrent=4,max_retries=1"
  echo "== lm-eval, text completions"
  "${tools}lm_eval" run --model local-completions --include_path examples/lm_eval --tasks guarded_facts \
    --model_args "model=embedded,base_url=$url/completions,num_concurrent=4,max_retries=1,tokenizer_backend=None,tokenized_requests=False"
  # The harness needs a tokenizer for these, and transformers to read it.
  tokenizer="$(ls -d "${XDG_CACHE_HOME:-$HOME/.cache}"/inferenceguard/smollm2-*-v1 | head -n 1)"
  if "${tools}python" -c "import transformers" 2> /dev/null; then
    echo "== lm-eval, log-likelihoods: refused"
    if "${tools}lm_eval" run --model local-completions --include_path examples/lm_eval --tasks guarded_likelihood \
      --model_args "model=embedded,base_url=$url/completions,max_retries=1,tokenizer=$tokenizer,tokenized_requests=False" \
      > "$work/refused.log" 2>&1; then
      echo "log-likelihoods were answered" && exit 1
    fi
    grep -o -m 1 "logprobs is not supported by this server" "$work/refused.log"
  fi
fi

if command -v "${tools}inspect" > /dev/null; then
  echo "== inspect-ai"
  INFERENCEGUARD_BASE_URL="$url" INFERENCEGUARD_API_KEY=none "${tools}inspect" eval examples/inspect_ai/facts.py \
    --model openai-api/inferenceguard/embedded --log-dir "$work/logs" --display plain
fi
