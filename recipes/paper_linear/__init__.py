"""A study of the paper's linear experiment; README.md says how to run it and what came out."""
