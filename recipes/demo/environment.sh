# What makes 03 fast on a CPU; run.sh and recipes/curve.sh source it.
# Freed memory is kept: a sixth of the time went into asking the system for the same pages again
# (one arena: kept pieces of several would add up)
export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_ARENA_MAX=1
# A CPU with matrix units for bf16 is twice as fast with them
if grep -qs amx_bf16 /proc/cpuinfo; then export ACCELERATE_MIXED_PRECISION=bf16; fi
