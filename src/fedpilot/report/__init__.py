"""Pictures of a run; the only folder that imports matplotlib."""
