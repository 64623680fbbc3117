"""Block formats of FP8 tensors, and how long a quantized weight may be used."""
