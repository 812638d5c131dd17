"""Named runs, a YAML file each; fastres.config finds them by name."""
