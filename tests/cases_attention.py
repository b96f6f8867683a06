"""Calls of attention: torch's fused function, and the multi-head function around it."""

from __future__ import annotations

from typing import Any

import torch
from case import C, Case, R, Table, inf


def heads(t: int, h: int = 2) -> R:
    return R(2, h, t, 4)


allowed = torch.ones(3, 5, dtype=torch.bool).tril(1)
blind = allowed.clone()
blind[1] = False  # a query that may look at nothing
additive = torch.zeros(3, 5, dtype=torch.float64).masked_fill(~allowed, -inf)
E = 8
weights = (R(3 * E, E), R(3 * E), None, None, False, 0.0, R(E, E), R(E))


def multi_head(q: R, k: R, v: R, *rest: Any, **kwargs: Any) -> Case:
    return C(q, k, v, E, 2, *(rest or weights), **kwargs)


late = torch.zeros(2, 5, dtype=torch.bool)
late[1, 3:] = True
query, key = R(3, 2, E), R(5, 2, E)
separate = (None, R(3 * E), None, None, False, 0.0, R(E, E), R(E))
packed = (R(3 * E, E), R(3 * E), R(E, E), R(E), 2)
later = torch.ones(3, 3, dtype=torch.bool).triu(1)
ATTENTION: Table = {
    "scaled_dot_product_attention": [
        C(heads(3), heads(5), heads(5)), C(heads(3), heads(5), heads(5), allowed),
        C(heads(3), heads(5), heads(5), attn_mask=additive),
            C(heads(4), heads(4), heads(4), is_causal=True),
        C(heads(3), heads(5), heads(5), is_causal=True), C(heads(3), heads(5), heads(5), blind),
        C(heads(3), heads(5), heads(5), R(3, 5)),
            C(heads(3), heads(5), heads(5), R(2, 1, 3, 5), scale=0.3),
        C(heads(3), heads(5), heads(5), R(2, 1, 1, 5)), C(heads(3), heads(5), heads(5), scale=2.0),
        C(heads(3, 4), heads(5), heads(5), enable_gqa=True), C(R(3, 4), R(5, 4), R(5, 6)),
        C(heads(3, 4), heads(5), heads(5), allowed, enable_gqa=True, scale=0.2),
        C(R(2, 3, 4), R(2, 5, 4), R(2, 5, 4)), C(R(0, 2, 3, 4), R(0, 2, 3, 4), R(0, 2, 3, 4)),
        C(heads(1), heads(1), heads(1)), C(R(1, 2, 3, 4), heads(5), heads(5)),
    ],
    "self_attention": [
        C(query, *packed), C(R(3, E), *packed), C(R(1, 2, E), *packed), C(R(3, 1, E), *packed),
        C(query, R(3 * E, E), None, R(5, E), None, 4),
        C(query, *packed, key_padding_mask=late[:, 2:]),
        C(R(5, E), *packed, late[1]), C(query, *packed, attn_mask=later),
        C(query, *packed, late[:, 2:], later, True), C(query, *packed, None, later, True),
        C(query, *packed, None, additive[:, :3]),
        C(query, *packed, None, later.expand(4, 3, 3)),
    ],
    "multi_head_attention_forward": [
        multi_head(query, query, query), multi_head(query, key, key),
        multi_head(query, key, R(5, 2, E), need_weights=False),
        multi_head(query, key, key, key_padding_mask=late),
        multi_head(query, key, key, key_padding_mask=late, need_weights=False),
        multi_head(query, key, key, attn_mask=~allowed, need_weights=False),
        multi_head(query, key, key, attn_mask=additive, average_attn_weights=False),
        multi_head(R(4, 2, E), R(4, 2, E), R(4, 2, E), need_weights=False, is_causal=True,
                   attn_mask=torch.ones(4, 4, dtype=torch.bool).triu(1)),
        multi_head(R(3, E), R(5, E), R(5, E), need_weights=False),
        multi_head(query, key, key, R(3 * E, E), None, None, None, False, 0.0, R(E, E), None),
        multi_head(query, key, key, R(3 * E, E), R(3 * E), R(1, 1, E), R(1, 1, E), True, 0.0, R(E,
            E), R(E)),
        multi_head(query, R(5, 2, 6), R(5, 2, 7), *separate, use_separate_proj_weight=True,
                   q_proj_weight=R(E, E), k_proj_weight=R(E, 6), v_proj_weight=R(E, 7),
                       need_weights=False),
    ],
}  # fmt: skip
