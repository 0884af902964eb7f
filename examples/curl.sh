#!/usr/bin/env bash
# Submits a task and streams its answer, with nothing but curl.
#
#     examples/curl.sh
set -euo pipefail

url=${ORCHD_URL:-http://127.0.0.1:8737}
file=${XDG_STATE_HOME:-$HOME/.local/state}/orchd/token
token=${ORCHD_TOKEN:-$(cat "$file" 2>/dev/null)} || {
  echo "no token in $file; start the server once with \`orchd serve\`, or set ORCHD_TOKEN" >&2
  exit 1
}
# We choose the task's id ourselves. The same request sent twice is then still one task, and there is no need to parse
# the answer to know the stream's URL.
task=$(cat /proc/sys/kernel/random/uuid)

hint() { # curl has said what went wrong; 7 means that nothing listens there
  [ "$1" != 7 ] || echo "Is \`orchd serve\` running at $url?" >&2
  exit "$1"
}

# The token is passed through a file descriptor: every user of this machine could read an argument.
authorization() { printf 'header = "Authorization: Bearer %s"\n' "$token"; }

curl -sS --fail-with-body --config <(authorization) "$url/v1/tasks" -H 'Content-Type: application/json' -d @- <<EOF || hint $?
{"task_id": "$task", "max_tokens": 64, "messages": [{"role": "user", "content": "Name three rivers."}]}
EOF
echo
curl -sSN --fail-with-body --config <(authorization) "$url/v1/tasks/$task/stream"
