"""The study of paper linear; see README.md beside this file."""
