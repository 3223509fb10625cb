"""The kernels on a real GPU: against the reference, run to run, on streams and in CUDA graphs."""
