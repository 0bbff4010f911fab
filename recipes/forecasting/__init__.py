"""A study of a forecaster of GluonTS; README.md says how to run it and what came out."""
