#!/usr/bin/env bash
# Download what Gossamer needs beside torch, triton, transformers and their own needs, for a GPU machine without a network:
#
#     benchmarks/carry_wheels.sh [FOLDER]      FOLDER is wheels/ when left out; git ignores it
#     PYTHON_VERSION=3.12 benchmarks/carry_wheels.sh
#
# benchmarks/on_gpu.py installs from wheels/ into a temporary folder there, when something is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-wheels}
version=${PYTHON_VERSION:-3.12}
most=$((64 * 1024)) # KiB
packages=(
    'fastapi>=0.120,<1' 'starlette>=0.46,<2' 'uvicorn>=0.35,<1' 'h11>=0.16,<1' 'orjson>=3.10,<4'
    'prometheus-client>=0.21,<1' 'typer>=0.16,<1' 'rich>=13.9,<16' 'jinja2>=3.1.6,<4'
    'pytest>=9,<10' 'hypothesis>=6.130,<7'
    # what these need
    annotated-doc annotated-types anyio click idna iniconfig markdown-it-py mdurl packaging pluggy pygments shellingham
    sortedcontainers typing-extensions typing-inspection
)

rm -rf "$folder"
mkdir -p "$folder"
fetch() {
    local platforms=()
    for glibc in 28 27 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$folder" \
        --python-version "$version" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 "$@"
}
fetch 'pydantic>=2.11,<3'
# pydantic names the one version of its core that it works with
core=$(python3 - "$folder"/pydantic-*.whl <<'PYTHON'
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    print(re.search(r"^Requires-Dist: pydantic-core==([^\s;]+)", wheel.read(metadata).decode(), re.MULTILINE)[1])
PYTHON
)
fetch "pydantic-core==$core" "${packages[@]}"

size=$(du -sk "$folder" | cut -f1)
printf '%s wheels, %s KiB in %s\n' "$(find "$folder" -name '*.whl' | wc -l)" "$size" "$folder"
if [ "$size" -gt "$most" ]; then
    printf 'more than the %s KiB that can be carried\n' "$most" >&2
    exit 1
fi
