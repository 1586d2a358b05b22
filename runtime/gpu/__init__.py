"""Requests on an NVIDIA GPU: engines, device memory, and one CUDA graph per request. Imported only for GPU backends."""
