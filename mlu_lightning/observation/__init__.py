"""What a run does to its residual stream, read and compared without Lightning."""
