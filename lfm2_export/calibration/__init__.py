"""What a model's linear layers are given on real text, collected once and kept in a file: what ``gptq`` needs."""
