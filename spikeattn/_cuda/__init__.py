"""CUDA kernels through CuPy and NVRTC: no toolkit, no build step. Nothing here imports CuPy before it is used."""
