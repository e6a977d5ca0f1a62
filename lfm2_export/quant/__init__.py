"""Quantization with numpy alone: formats, schemes as data, and one file per algorithm."""
