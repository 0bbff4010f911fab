"""From measured errors to the best shape for a number of parameters."""
