"""Several methods on the same data, budgets, seeds and steps: ``fedpilot compare``.

`study` says which runs there are and checks them before anything starts, `workers` runs them in processes, `tuning`
chooses settings on validation data, `figures` reads numbers off the runs' records, `report` writes them down.
"""
