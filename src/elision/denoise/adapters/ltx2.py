"""`LTX2VideoTransformer3DModel`: a stream of video and one of audio, which attend to each other, and two predictions.

Criteria look at the video; stand-ins are made for both.
"""

from __future__ import annotations

from functools import partial

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_table

_STREAMS = ("hidden_states", "audio_hidden_states")

LTX2 = Adapter(
    "LTX2VideoTransformer3DModel",
    lists=("transformer_blocks",),
    blocks={
        "LTX2VideoTransformerBlock": BlockSpec(
            _STREAMS,
            (
                BranchSpec("attn1", "self"),
                BranchSpec("audio_attn1", "self"),
                BranchSpec("attn2", "cross"),
                BranchSpec("audio_attn2", "cross"),
                BranchSpec("audio_to_video_attn", "cross"),
                BranchSpec("video_to_audio_attn", "cross"),
                BranchSpec("ff", "mlp"),
                BranchSpec("audio_ff", "mlp"),
            ),
        )
    },
    kept=_STREAMS,
    others=("audio_hidden_states",),
    lacks={"head": "video and audio leave through heads of their own"},
    modulated=partial(by_table, "temb"),
    whole="makes positions from the size of the video",
)
