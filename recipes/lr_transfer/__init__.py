"""The study of lr transfer; see README.md beside this file."""
