#!/usr/bin/env bash
# Runs tests of torchdrop with other versions of PyTorch, each in a virtual environment of its own:
#
#   tests/versions.sh                     every version of the matrix
#   tests/versions.sh 2.6.0 2.8.0         these versions
#   tests/versions.sh 2.6.0 -- tests/ops  these tests with this version
#   tests/versions.sh --record            also measures dropout's speed, and writes both into the table of versions
#
# The environments stay in ${VERSIONS_DIR:-.versions}, so that a second run installs nothing. PYTHON names the interpreter.
# PyTorch's wheels for Linux name CUDA's libraries as requirements. Only those without which `import torch` fails are
# installed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${VERSIONS_DIR:-.versions}")
python=${PYTHON:-python3}
versions=() tests=() record=
[ "${1:-}" != --record ] || { record=yes; shift; }
while [ $# -gt 0 ] && [ "$1" != -- ]; do versions+=("$1"); shift; done
[ $# -gt 0 ] && shift
tests=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(2.6.0 2.8.0 2.11.0 2.13.0 2.14.1 2.15.0)
[ ${#tests[@]} -gt 0 ] || tests=(tests/core tests/handlers tests/kernels tests/layers tests/monte_carlo tests/ops tests/configure
  tests/test_family.py tests/test_pinned_masks.py tests/test_random.py tests/test_frozen_masks.py tests/test_scheduler.py)

prepare() { # the environment $1 with PyTorch $2
  "$python" -m venv "$1"
  "$1/bin/pip" install -q --upgrade pip "setuptools>=77"
  "$1/bin/pip" install -q --no-deps "torch==$2"
  "$1/bin/python" - <<'PYTHON'
import importlib.metadata, re, subprocess, sys

def install(*requirements):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *requirements], check=True)

wanted = [r.partition(";")[0].strip() for r in importlib.metadata.requires("torch") or [] if "extra ==" not in r]
# A package that only names others by its extras is taken apart.
for whole in [r for r in wanted if r.startswith("cuda-toolkit[")]:
    name, extras, version = re.match(r"(.*)\[(.*)\](.*)", whole).groups()
    wanted = [r for r in wanted if r != whole] + [f"{name}[{extra}]{version}" for extra in extras.split(",")]
cuda = [r for r in wanted if re.match("nvidia|cuda", r)]
install(*[r for r in wanted if r not in cuda and not r.startswith("triton")])
while True:
    run = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)
    if run.returncode == 0:
        break
    missing = re.search(r"lib(\w+?)\.so", run.stderr)
    if missing is None:
        sys.exit(run.stderr)
    packages = {"cudart": "cuda-runtime", "nvrtc": "cuda-nvrtc", "cupti": "cuda-cupti", "nvToolsExt": "nvtx",
                "cusparseLt": "cusparselt", "cublasLt": "cublas", "nvJitLink": "nvjitlink", "nvshmem_host": "nvshmem"}
    name = packages.get(missing[1], missing[1])
    found = [r for r in cuda if f"[{missing[1].lower()}]" in r] or [r for r in cuda if name in r.replace("_", "-")]
    if not found:
        sys.exit(f"nothing in {cuda} has {missing[0]}")
    cuda = [r for r in cuda if r not in found[:1]]
    install(*["--no-deps"] * ("[" not in found[0]), found[0])
PYTHON
  "$1/bin/pip" install -q "hypothesis>=6.100" "numpy>=1.26" pandas "pytest>=8" "pytest-xdist>=3.6" "randomgen>=2" \
    packaging "scikit-learn>=1.7" "scipy>=1.11" tqdm
  "$1/bin/pip" install -q --no-deps "torchmetrics>=1.4" lightning-utilities # its requirements name CUDA's libraries again
  "$1/bin/pip" install -q --no-deps --no-build-isolation -e .
}

for version in "${versions[@]}"; do
  environment=$folder/$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')-torch-$version
  [ -e "$environment/ready" ] || { prepare "$environment" "$version" && touch "$environment/ready"; }
  echo "== torch $version, $("$environment/bin/python" --version)"
  "$environment/bin/python" -m pytest -q -n 2 --dist worksteal -p no:cacheprovider --junitxml="$environment/tests.xml" \
    "${tests[@]}" || failed+=" $version"
  [ -z "$record" ] || "$environment/bin/python" benchmarks/versions.py --tests "$environment/tests.xml"
done
[ -z "${failed:-}" ] || { echo "failed:$failed" >&2; exit 1; }
