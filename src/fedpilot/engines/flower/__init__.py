"""The engine of a federation of several machines: Flower's messages, grid, TLS and node authentication.

Only this folder imports flwr, and only when the engine is used: ``pip install 'fedpilot[flower]'``.
"""
