"""Our C++ operators for ExecuTorch: sources, building, packing of weights, and their declarations for PyTorch."""
