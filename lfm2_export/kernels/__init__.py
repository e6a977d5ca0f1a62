"""Our C++ operators for ONNX Runtime and ExecuTorch: sources and building; for ExecuTorch also packing of weights, and
their declarations for PyTorch.
"""
