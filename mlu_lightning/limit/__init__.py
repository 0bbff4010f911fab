"""The infinite model: what a residual network becomes as depth, hidden width and embedding grow."""
