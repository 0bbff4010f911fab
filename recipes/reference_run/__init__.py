"""The study of reference run; see README.md beside this file."""
