"""DanceOPD: on-policy generative field distillation."""
