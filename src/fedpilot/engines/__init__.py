"""Engines carry tasks to clients and results back."""
