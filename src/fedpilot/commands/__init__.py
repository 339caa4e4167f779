"""What the commands do, a module each; `fedpilot.cli` holds their options."""
