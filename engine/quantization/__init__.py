"""Lower precision with QuantizeLinear and DequantizeLinear: which layers, what comes in, how it is rounded."""
