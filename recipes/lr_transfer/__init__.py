"""A study of learning rates that transfer; README.md says how to run it and what came out."""
