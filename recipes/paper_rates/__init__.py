"""The study of paper rates; see README.md beside this file."""
