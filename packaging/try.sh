#!/usr/bin/env bash
# Try localllm from a checkout: sets it up (the first time) and lets the built-in demo model answer.
#
#   packaging/try.sh                 one answer
#   packaging/try.sh run demo        a chat; any localllm command goes here
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

"$here/setup.sh"
localllm=$here/../.venv/bin/localllm
if [ $# -gt 0 ]; then
  exec "$localllm" "$@"
fi
question="Write a short story about Marta and a castle."
printf '> %s\n' "$question" >&2
"$localllm" run demo "$question"
printf '\nMore:  packaging/try.sh run demo    a chat\n       packaging/try.sh bench demo  measure this machine\n' >&2
