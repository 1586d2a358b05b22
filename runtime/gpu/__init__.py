"""Requests on an NVIDIA GPU: engines, device memory, CUDA graphs of requests. Imported only for GPU backends."""
