"""Sample grids of a run."""

PREVIEW_SAMPLES, MODEL_SAMPLES = 8, 4  # of each capability in a sample grid: of the embedded network, of a model
