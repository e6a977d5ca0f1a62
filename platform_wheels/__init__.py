"""Makes wheels for one platform out of the pure one: the same files, and ONNX Runtime's operator library, compiled."""
