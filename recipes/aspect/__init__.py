"""Does the learning rate stay where it is when hidden width and embedding grow apart? README.md says what came out."""
