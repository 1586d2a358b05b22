"""Requests on an NVIDIA GPU: engines, device memory, and CUDA graphs of whole requests. Imported only for GPU backends."""
