#!/usr/bin/env bash
# Everything that waits for a GPU, on a machine without network: build, tests, benchmarks. Steps are bounded in time and
# independent: one that fails does not stop the next.
#
#   benchmarks/gpu_session.sh OUTPUT_FOLDER [WHEELS_FOLDER|-] [STEP...]
#
# Steps: build smoke test-attention test-contrastive test-rows test-cuda test-slow bench-attention bench-packed bench-contrastive.
# Without steps: all but test-slow, in at most 60 minutes; `build smoke test-attention` and each pair of the others fit
# into nine. PYTHON is the interpreter that has PyTorch and Triton (python3); nothing is installed into it but what is
# missing: the project and the wheels go into a virtual environment beside the build, which sees its packages.
set -uo pipefail
output=$(mkdir -p "${1:?output folder}" && cd "$1" && pwd)
wheels=${2:--}
[ "$wheels" = - ] || wheels=$(cd "$wheels" && pwd)
shift $(($# < 2 ? $# : 2))
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(build smoke test-attention test-contrastive test-rows test-cuda
  bench-attention bench-packed bench-contrastive)
cd "$(dirname "$0")/.."
environment=$PWD/build/gpu-session
python=$environment/bin/python
status=0

run() { # name, seconds, command...: log and exit status in the output folder
  local name=$1 seconds=$2 code
  shift 2
  echo "== $name: $*"
  timeout "$seconds" "$@" >"$output/$name.log" 2>&1
  code=$?
  tail -n 15 "$output/$name.log"
  echo "$name $code" >>"$output/status.txt"
  [ $code -eq 0 ] || status=1
}

build() {
  local seen
  if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -m venv "$environment" || return
    # Also where PYTHON is itself in a virtual environment, which --system-site-packages would leave out.
    seen=$("${PYTHON:-python3}" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
    echo "import site; site.addsitedir('$seen')" \
      >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/seen.pth"
  fi
  local packages=(numba polars lightning schedulefree torchmetrics hydra-core rich matplotlib safetensors pyyaml
    pytest hypothesis pytest-timeout psutil pytest-benchmark scikit-build-core pybind11)
  if [ "$wheels" != - ]; then
    # Only what is missing: what the machine has, PyTorch above all, stays as it is.
    "$python" -m pip install --quiet --no-index --find-links "$wheels" "${packages[@]}" || echo "some wheels are missing"
  fi
  UBP_CUDA=${UBP_CUDA:-AUTO} "$python" -m pip install --no-index --no-build-isolation --no-deps -e . || return
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv
  "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
  # One call of each kernel: what fails here fails everywhere.
  "$python" - <<'CODE'
import torch
from ubp_fast.kernels import flash_attention, nt_xent
rows = torch.randn(100, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
offsets = torch.tensor([0, 40, 100], device="cuda", dtype=torch.int32)
out = flash_attention(rows, rows, rows, offsets, causal=True, backend="triton")
out.float().square().sum().backward()
want = flash_attention(rows, rows, rows, offsets, causal=True, backend="reference")
print("attention", float((out - want).detach().abs().max()), bool(torch.isfinite(rows.grad).all()))
left = torch.randn(500, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
loss = nt_xent(left, left.detach().roll(1, 1), backend="triton")
loss.backward()
print("nt_xent", float(loss.detach()), float(nt_xent(left, left.detach().roll(1, 1), backend="reference").detach()))
CODE
}

tests() { run "$1" "$2" "$python" -m pytest -q --durations=5 "${@:3}"; }
bench() { run "$1" "$2" "$python" -m pytest -q --results "$output/results" "${@:3}"; }

for step in "${steps[@]}"; do
  case $step in
    build) export -f build && export environment python wheels && run build 480 bash -c build ;;
    smoke) export -f facts && export python && run smoke 120 bash -c facts ;;
    test-attention) tests "$step" 420 tests/kernels/test_triton_flash_attention.py ;;
    test-contrastive) tests "$step" 420 tests/kernels/test_triton_nt_xent.py ;;
    test-rows) tests "$step" 240 tests/kernels/test_triton_row_sparse.py ;;
    test-cuda) tests "$step" 420 -m gpu tests/kernels/test_cuda.py ;;
    test-slow) tests "$step" 480 --slow -m "gpu and slow" tests/kernels ;;
    bench-attention) bench "$step" 500 benchmarks/bench_flash_attention_gpu.py -k dense ;;
    bench-packed) bench "$step" 240 benchmarks/bench_flash_attention_gpu.py -k packed ;;
    bench-contrastive) bench "$step" 300 benchmarks/bench_nt_xent_gpu.py ;;
    *) echo "unknown step: $step" && status=2 ;;
  esac
done
exit $status
