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
# pyproject.toml's, but accelerate, numpy, safetensors and tokenizers, which come with transformers and torch
packages=(
    'fastapi>=0.120,<1' 'h11>=0.16,<1' 'jinja2>=3.1.6,<4' 'orjson>=3.10,<4' 'prometheus-client>=0.21,<1'
    'pydantic>=2.11,<3' 'pyyaml>=6.0.1,<7' 'rich>=13.9,<16' 'starlette>=0.46,<2' 'typer>=0.16,<1' 'uvicorn>=0.35,<1'
    'pytest>=9,<10' 'hypothesis>=6.130,<7'
)
platforms=()
for glibc in 28 27 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done

rm -rf "$folder"
mkdir -p "$folder"
# with what these need, of which pip finds one version each
python3 -m pip download --quiet --disable-pip-version-check --only-binary=:all: --dest "$folder" \
    --python-version "$version" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 "${packages[@]}"

# its needs, torch and triton, are there
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$folder" \
    'liger-kernel>=0.8,<0.9'

size=$(du -sk "$folder" | cut -f1)
printf '%s wheels, %s KiB in %s\n' "$(find "$folder" -name '*.whl' | wc -l)" "$size" "$folder"
if [ "$size" -gt "$most" ]; then
    printf 'more than the %s KiB that can be carried\n' "$most" >&2
    exit 1
fi
