"""Data sets in, one client's examples out."""
