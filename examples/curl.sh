#!/usr/bin/env bash
# Submits a task and streams its answer, with nothing but curl.
#
#     examples/curl.sh
set -euo pipefail

url=${ORCHD_URL:-http://127.0.0.1:8737}
token=${ORCHD_TOKEN:-$(cat "${XDG_STATE_HOME:-$HOME/.local/state}/orchd/token")}
# We choose the task's id ourselves. The same request sent twice is then still one task, and there is no need to parse
# the answer to know the stream's URL.
task=$(cat /proc/sys/kernel/random/uuid)

# The token is passed through a file descriptor: every user of this machine could read an argument.
authorization() { printf 'header = "Authorization: Bearer %s"\n' "$token"; }

curl -sS --fail-with-body --config <(authorization) "$url/v1/tasks" -H 'Content-Type: application/json' -d @- <<EOF
{"task_id": "$task", "max_tokens": 64, "messages": [{"role": "user", "content": "Name three rivers."}]}
EOF
echo
curl -sSN --fail-with-body --config <(authorization) "$url/v1/tasks/$task/stream"
