#!/bin/sh
# Installs this repository with its service, and what that needs: all that the RUN lines of the Dockerfile do. Outside of
# a container it does so in any environment, for any user:
#
#     python3 -m venv /tmp/trial && PYTHON=/tmp/trial/bin/python sh tools/container_setup.sh cpu
#
# cpu: PyTorch's build without CUDA; cuda: PyPI's, whose packages bring the CUDA libraries. EXTRAS: of pyproject.toml.
# TORCH_INDEX: options of pip that say where PyTorch is.
set -eu
target=${1:-}
python=${PYTHON:-python3}
root=$(dirname "$(dirname "$(readlink -f "$0")")")
case $target in
    cpu) index=${TORCH_INDEX---index-url https://download.pytorch.org/whl/cpu} ;;
    cuda) index=${TORCH_INDEX-} ;;
    *) echo "usage: container_setup.sh cpu|cuda" >&2; exit 2 ;;
esac

if [ "${CONTAINER:-}" = 1 ]; then
    # Triton compiles what launches its kernels while it runs, with a C compiler; torch.compile code for the CPU with g++.
    apt-get update
    apt-get install -y --no-install-recommends g++
    rm -rf /var/lib/apt/lists/*
    useradd --uid 1000 --create-home infinitetalk
    install -d -o infinitetalk -g infinitetalk /data
fi

# shellcheck disable=SC2086  # options, not one word
"$python" -m pip install --no-cache-dir $index 'torch>=2.8'
"$python" -m pip install --no-cache-dir "$root[${EXTRAS:-web}]"
cd / # where the installed package is found, not the repository
"$python" -m wanvideo_infinitetalk.cli --help > /dev/null
