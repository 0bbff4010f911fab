"""Does the learning rate stay where it is when hidden width and embedding grow apart? Settings for recipes.lr_transfer."""
