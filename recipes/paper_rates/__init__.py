"""A study of the paper's nonlinear experiment; README.md says how to run it and what came out."""
