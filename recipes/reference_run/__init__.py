"""A study of distances to a reference run; README.md says how to run it and what came out."""
