"""Makes the paper's tables and ablations, and what goes beyond them, on the picture world: `danceopd reproduce`."""
