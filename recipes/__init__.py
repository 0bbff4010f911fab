"""Studies: each folder is one, with a card, README.md, that says how to run it and what came out."""
