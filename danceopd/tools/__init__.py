"""Commands that use the trainer: export, merging LoRAs, the report of a model."""
