"""Check that a module, its plan and its optimizers do what the MLU parameterization says, at several shapes."""
