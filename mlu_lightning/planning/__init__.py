"""From a structure and a base shape to a plan: the table's factors for every parameter."""
