"""The study of check; see README.md beside this file."""
