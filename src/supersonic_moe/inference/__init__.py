"""The FP8 Mixture-of-Experts operator for serving: block-scaled weights as a checkpoint stores them, nothing prepacked.

moe_fp8_ds_routed   router logits -> DeepSeek routing -> experts of this rank -> combined bf16 output
moe_fp8_topk        the same behind your own router: expert ids and weights of each token
SharedExpert        an expert that every token has, for ``moe_fp8_topk``
workspace_bytes     device memory that a call needs, from shapes alone
"""

from supersonic_moe.inference import decode, flops  # noqa: F401  define an op and register FLOPs
from supersonic_moe.inference.ds_routed import moe_fp8_ds_routed
from supersonic_moe.inference.topk import SharedExpert, moe_fp8_topk
from supersonic_moe.inference.workspace import workspace_bytes

__all__ = ["SharedExpert", "moe_fp8_ds_routed", "moe_fp8_topk", "workspace_bytes"]
