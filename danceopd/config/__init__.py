"""The configuration: one YAML file, checked whole before anything is computed."""
