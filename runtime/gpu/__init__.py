"""Requests on an NVIDIA GPU: engines, device memory and one CUDA graph per request. Loaded when such a backend is."""
