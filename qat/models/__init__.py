"""Float networks in plain NNX, one file a family. They know nothing of quantization."""
