"""The published figures of arXiv 2606.27377: GEditBench average and GenEval overall. Not measured here."""

# method: (edit average, GenEval overall); None where none is given
TABLES = {
    "A": {
        "source_t2i": (None, 0.832),
        "source_edit": (4.930, 0.711),
        "joint": (4.617, 0.808),
        "weight_merge": (0.344, 0.836),
        "off_policy": (4.528, 0.818),
        "diffusion_opd": (4.947, 0.833),
        "flow_opd": (4.854, 0.814),
        "danceopd": (5.347, 0.849),
    },
    "B": {
        "source_t2i": (None, 0.832),
        "source_local": (5.095, 0.793),
        "source_global": (3.750, 0.808),
        "joint": (4.546, 0.821),
        "weight_merge": (4.715, 0.811),
        "off_policy": (4.736, 0.798),
        "diffusion_opd": (4.661, 0.822),
        "flow_opd": (4.679, 0.827),
        "danceopd": (5.498, 0.848),
    },
    "ablations": {
        "danceopd": (5.751, None),
        "soft": (4.994, None),
        "mid_t": (4.649, None),
        "high_t": (4.813, None),
        "k4": (5.330, None),
        "k16": (5.127, None),
        "steps16": (5.751, 0.858),
    },
}

STYLE_GAP_CLOSED = 0.853

GUIDANCE_BEST = 5.833  # edit average of the best composition of training and inference scale

OVER_GUIDED = (49, 4.015)  # product of the two scales, edit average there
