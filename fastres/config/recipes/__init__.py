"""Named runs, a YAML file each; fastres.config.schema finds them by name."""
