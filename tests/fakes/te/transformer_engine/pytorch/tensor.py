class QuantizedTensor:
    """Weights kept in FP8; nothing here is one."""
