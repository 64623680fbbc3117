"""From router logits to the device metadata that every kernel needs."""
