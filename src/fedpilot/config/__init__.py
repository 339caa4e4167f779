"""TOML in, a run's parts out: `recipe` reads and checks, `setup` builds. Nobody else sees the configuration."""
