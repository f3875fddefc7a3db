"""The studies of ``adapterkern ablate --preset``.

Both are for the first 8 layers of SmolLM2-135M and Reuters R8, and sized for a CPU: adapters near the top share most of
the frozen prefix, whose activations are computed once.
"""

import math

from adapterkern.model.config import AdapterConfig
from adapterkern.recipes.ablation.study import Study
from adapterkern.training.config import TrainConfig

WHERE = Study(
    adapter=AdapterConfig(adapter_dim=64, layers=(-2, -1)),
    training=TrainConfig(epochs=2, batch_size=16, lr=8e-3, max_length=32),
    vary={
        "layers": ((-2, -1), (-1,), (-3, -2, -1), (-5, -4), (-8, -7)),
        "every": (1,),
        "position": ("layer", "attention"),
        "depth": (1, 2, 4),
        "adapter_dim": (64, 8, 256),
        "activation": ("silu", "gelu", "relu", "tanh", "identity"),
        "init": ("identity", "xavier", "svd"),
        "lr": (8e-3, 1e-3, 4e-3, 1.6e-2, 3.2e-2),
    },
)

# Three times the default learning rate here: the other defaults should survive a user's wrong guess of it.
STABILITY = Study(
    adapter=AdapterConfig(adapter_dim=64, layers=(-2, -1)),
    training=TrainConfig(epochs=2, batch_size=16, lr=2e-2, max_length=32, log_every=1),
    vary={
        "init": ("identity", "xavier", "svd"),
        "max_norm": (1.0, math.inf),
        "warmup": (0.06, 0.0),
    },
    product=True,
    head_alone=False,
)

PRESETS = {"where": WHERE, "stability": STABILITY}
