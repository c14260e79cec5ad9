#!/bin/bash
# Everything that a GPU is to be asked about the training step, in one call of at most eight minutes: rates of the machine, the
# step and its parts, a profile, PyTorch beside it. What is cut short by its time limit has told each turn until then.
#
#     bash benchmarks/gpu.sh 2>&1 | tee gpu.txt
#
# With these two flags XLA does not try Triton's kernels for each matmul and each fusion before the first step.
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
export XLA_FLAGS="--xla_gpu_experimental_enable_fusion_autotuner=false --xla_gpu_enable_triton_gemm=false $XLA_FLAGS"
images="--images=12+12 --size=256"
timeout 150 python3 benchmarks/step.py --config=base $images --dtype=bfloat16 --repeats=3 --trace="$(mktemp -d)"
timeout 200 python3 benchmarks/torch_step.py $images --dtype=bfloat16 --repeats=5
timeout 120 python3 benchmarks/torch_step.py $images --dtype=float32 --repeats=5 --eager
