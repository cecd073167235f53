"""A student and sources that are sharded over several ranks."""
