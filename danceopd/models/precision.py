"""The precisions of a model's weights."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
