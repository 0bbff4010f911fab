"""The study of phase diagram; see README.md beside this file."""
