"""One command that proves the kernels on a GPU and measures what was predicted: `python -m benchmarks.gpu_report`."""
