#!/usr/bin/env bash
# Unpacks orchd beside this file, tests it and measures it on this machine. Needs Python 3.12 and, for a GPU, NVIDIA's driver;
# no network. `./run.sh --help` lists the options, README.txt tells what is in here.
set -euo pipefail
export ORCHD_BUNDLE_BEGAN=$EPOCHREALTIME
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wanted=3.12

found=()
for python in ${ORCHD_PYTHON:-} "python$wanted" python3 python; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  [[ $version == "$wanted" ]] && exec "$python" "$here/unpack.py" "$@"
  found+=("$python is $version")
done
IFS=,
echo "run.sh: Python $wanted was not found (${found[*]:-there is no Python at all}); install it, or name it:" \
  "ORCHD_PYTHON=/path/to/python$wanted ./run.sh" >&2
exit 2
