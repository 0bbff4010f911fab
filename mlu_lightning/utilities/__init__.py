"""Helpers that know nothing of parameterizations."""
