"""A study of the check; README.md says how to run it and what came out."""
