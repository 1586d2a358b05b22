"""torch as a backend of the loop on the device: runs the typed ONNX graphs, for tests and benchmarks."""
