"""The study of forecasting; see README.md beside this file."""
