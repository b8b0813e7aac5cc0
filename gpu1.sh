python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site ../../.whl/*.whl 2>&1 | tail -1
export PYTHONPATH=/tmp/site:$PYTHONPATH
nvidia-smi --query-gpu=name --format=csv,noheader
export XLA_PYTHON_CLIENT_PREALLOCATE=false
(timeout 70 python3 bench1.py gpu-2x8192x16x128-causal two 1:24e6 1:1e9 2:24e6 cudnn 2>$OUT/b1.err; timeout 50 python3 bench1.py gpu-2x8192x16x128 two 1:24e6 2:24e6 cudnn 2>$OUT/b2.err; timeout 50 python3 bench1.py gpu-1x32768x16x128-causal two 1:24e6 1:1e9 cudnn 2>$OUT/b3.err) > $OUT/bench.txt
date +%T
XLA_PYTHON_CLIENT_MEM_FRACTION=.05 timeout 130 python3 -m pytest -q -x --maxfail=40 -m gpu -o addopts="" -n 14 -p no:cacheprovider tests/test_mosaic_gpu.py > $OUT/tests.txt 2>&1
date +%T
timeout 110 python3 benchmarks/benchmark_gpu_table.py --mode gradient --threads 14 --repeats 3 --implementations flash jax.nn:cudnn --shapes alphafold-384x384x4x64 alphafold-256x768x4x32 gpu-bias-2x4096x16x64 gpu-lengths-8x4096x16x128 gpu-2x4096x8x256-causal gpu-window-1024-0-1x16384x32/8x128 gpu-8x512x16x64 gpu-32x128x8x64 > $OUT/table.txt 2>$OUT/table.err
date +%T
tail -3 $OUT/tests.txt; grep -h "same\|DIFF\|RESULT\|Error" $OUT/bench.txt; grep "^|" $OUT/table.txt
