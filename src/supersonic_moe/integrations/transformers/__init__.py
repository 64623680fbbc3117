"""An experts backend of Hugging Face Transformers, for training and inference, prefill and decode.

    import supersonic_moe.integrations.transformers          # registers "supersonic" and "supersonic_fp8"

    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="supersonic")
    model.set_experts_implementation("supersonic_fp8")       # the same weights, multiplied in FP8
    print(served(model))                                     # which layers are served, by what, and why not

Every experts class that the library decorates with ``use_experts_implementation`` computes what its own forward does:
gates are recognised by their code (``gates.py``), never by the name of an activation in a config. A gate that is not
known runs between two grouped products, as PyTorch, with one warning. What is not decorated keeps the library's own
forward, and :func:`served` names it.

The contract of the library (``transformers/integrations/moe.py``): a backend is a function of the experts module,
hidden states (T, H), expert ids (T, K) int64 where ids outside [0, E) are skipped, and router weights (T, K); it
returns the weighted sum (T, H) in the dtype of the hidden states. Written for, and tested with, Transformers 5.17.
"""

import sys

from supersonic_moe.config.recipe import Fp8Recipe

try:
    from supersonic_moe.integrations.transformers.backend import register
    from supersonic_moe.integrations.transformers.held_weights import constant_weights
    from supersonic_moe.integrations.transformers.report import Served, served
except ImportError as error:  # an older version lacks modules, before register() could say so
    found = getattr(sys.modules.get("transformers"), "__version__", "none")
    raise ImportError(
        f"supersonic_moe.integrations.transformers needs Transformers 5.17 or newer; got {found} ({error}). Run pip "
        "install -U 'transformers>=5.17'."
    ) from error

__all__ = ["Served", "constant_weights", "register", "served"]

register("supersonic")
register("supersonic_fp8", recipe=Fp8Recipe())
