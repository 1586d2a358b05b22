"""An attention processor that lets all frames share one copy of the text."""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention


class SharedTextAttnProcessor:
    """Self-attention, and cross-attention to a text that is the same for every frame.

    Cross-attention folds the frames into the query's sequence. Softmax works row by row, so [B, F*N] queries against
    [B, T] keys give the same numbers as the text repeated F times. The keys and values are projected once per prompt
    instead of once per frame.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps hidden_states [B*F, N, C] and encoder_hidden_states [B, T, D] (or none) to [B*F, N, C]."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch = text.shape[0]
        head_dim = attn.inner_dim // attn.heads

        def split_heads(states: torch.Tensor) -> torch.Tensor:  # [B, S, heads*d] -> [B, heads, S, d]
            return states.reshape(batch, -1, attn.heads, head_dim).transpose(1, 2)

        query = split_heads(attn.to_q(hidden_states))
        key = split_heads(attn.to_k(text))
        value = split_heads(attn.to_v(text))
        states = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        states = states.transpose(1, 2).reshape((*hidden_states.shape[:-1], attn.inner_dim))
        states = attn.to_out[0](states)
        return states
