"""From a module and an example to its structure: residual streams, branches, and the role of every parameter."""
