"""The named modules that take the place of what was matched: what `print(model)` then shows."""

from liger_fx.modules.add_layer_norm import LigerAddLayerNorm
from liger_fx.modules.add_rms_norm import LigerAddRMSNorm
from liger_fx.modules.experts import LigerExperts
from liger_fx.modules.gated_mlp import LigerGEGLUMLP, LigerReGLUMLP, LigerSwiGLUMLP
from liger_fx.modules.gated_product import LigerGEGLU, LigerReGLU, LigerSigmoidGate, LigerSwiGLU
from liger_fx.modules.layer_norm import LigerLayerNorm
from liger_fx.modules.linear_cross_entropy import LigerFusedLinearCrossEntropy
from liger_fx.modules.mlp import LigerMLP
from liger_fx.modules.qk_norm_rotary import LigerNormRotaryEmbedding, LigerQKNormRotaryEmbedding
from liger_fx.modules.rms_norm import LigerRMSNorm
from liger_fx.modules.rotary import LigerRotaryEmbedding, LigerSingleRotaryEmbedding

__all__ = [
    "LigerAddLayerNorm",
    "LigerAddRMSNorm",
    "LigerExperts",
    "LigerFusedLinearCrossEntropy",
    "LigerGEGLU",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerMLP",
    "LigerNormRotaryEmbedding",
    "LigerQKNormRotaryEmbedding",
    "LigerRMSNorm",
    "LigerReGLU",
    "LigerReGLUMLP",
    "LigerRotaryEmbedding",
    "LigerSigmoidGate",
    "LigerSingleRotaryEmbedding",
    "LigerSwiGLU",
    "LigerSwiGLUMLP",
]
