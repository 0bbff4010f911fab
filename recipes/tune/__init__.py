"""A study of factors tuned at a small base; README.md says how to run it and what came out."""
