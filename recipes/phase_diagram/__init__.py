"""A study of other residual scales; README.md says how to run it and what came out."""
