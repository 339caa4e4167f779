"""The command line. Importing a module registers its commands; heavy imports stand inside them."""

from fedpilot.cli import assets, compare, export, flower, operate, plan, predict, profile, recipes, report, run, watch
from fedpilot.cli.base import LogFile, app, main

__all__ = [
    "LogFile",
    "app",
    "assets",
    "compare",
    "export",
    "flower",
    "main",
    "operate",
    "plan",
    "predict",
    "profile",
    "recipes",
    "report",
    "run",
    "watch",
]
