"""The study that the quickstart command runs."""
