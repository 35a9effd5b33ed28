"""The mLSTM cell (xLSTM, arXiv:2405.04517, eq. 19-27), a token or a sequence at a time.

Shipped inside every export, so it imports torch alone.

Shapes: b batch, t time, h heads, k query-key size, v value size, l chunk length. The state (C, n, m) is the memory
c_bhkv, its normaliser n_bhk and the stabiliser m_bh: the true memory is C * exp(m). All of it fp32. A padded token has
input gate ``MASKED_GATE`` and log-forget gate 0.
"""

import torch

MASKED_GATE = -1e30  # writes nothing, and no inf - inf can arise


def mlstm_step(q_bhk, k_bhk, v_bhv, igate_bh, log_fgate_bh, state, eps):
    """One token of the recurrence; everything fp32, q already scaled. Returns h_bhv and the new (C, n, m)."""
    c_bhkv, n_bhk, m_bh = state
    new_m_bh = torch.maximum(log_fgate_bh + m_bh, igate_bh).detach()
    keep_bh = torch.exp(log_fgate_bh + m_bh - new_m_bh)
    write_bh = torch.exp(igate_bh - new_m_bh)
    c_bhkv = keep_bh[..., None, None] * c_bhkv + (write_bh[..., None] * k_bhk)[..., None] * v_bhv[..., None, :]
    n_bhk = keep_bh[..., None] * n_bhk + write_bh[..., None] * k_bhk
    numerator_bhv = (q_bhk[..., None, :] @ c_bhkv).squeeze(-2)
    denominator_bh = torch.maximum((q_bhk * n_bhk).sum(-1).abs(), torch.exp(-new_m_bh)) + eps
    return numerator_bhv / denominator_bh[..., None], (c_bhkv, n_bhk, new_m_bh)


def mlstm_chunkwise(q_bhtk, k_bhtk, v_bhtv, igate_bht, log_fgate_bht, state, chunk_size, eps):
    """Any number of tokens, a chunk at a time; everything fp32, q already scaled. Returns h_bhtv and the last (C, n, m).

    The stabiliser m is the one of the recurrence (eps sits on the stabilised scale, so that it matters) and is not
    differentiated: the result depends on it through eps alone.
    """
    c_bhkv, n_bhk, m_bh = state
    causal_ll = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q_bhtk.device).tril()
    outputs = []
    for start in range(0, q_bhtk.shape[2], chunk_size):
        part = slice(start, start + chunk_size)
        q_bhlk, k_bhlk, v_bhlv = q_bhtk[:, :, part], k_bhtk[:, :, part], v_bhtv[:, :, part]
        igate_bhl, decay_bhl = igate_bht[..., part], log_fgate_bht[..., part].cumsum(-1)
        length = q_bhlk.shape[2]
        # inside the chunk: token s reaches token t with weight exp(decay_t - decay_s + igate_s)
        weight_bhll = decay_bhl[..., :, None] - decay_bhl[..., None, :] + igate_bhl[..., None, :]
        weight_bhll = weight_bhll.masked_fill(~causal_ll[:length, :length], -torch.inf)
        row_m_bhl = torch.maximum(decay_bhl + m_bh[..., None], weight_bhll.amax(-1)).detach()
        p_bhll = (q_bhlk @ k_bhlk.transpose(-1, -2)) * torch.exp(weight_bhll - row_m_bhl[..., None])
        past_bhl = torch.exp(decay_bhl + m_bh[..., None] - row_m_bhl)
        numerator_bhlv = past_bhl[..., None] * (q_bhlk @ c_bhkv) + p_bhll @ v_bhlv
        dot_bhl = past_bhl * (q_bhlk @ n_bhk[..., None]).squeeze(-1) + p_bhll.sum(-1)
        outputs.append(numerator_bhlv / (torch.maximum(dot_bhl.abs(), torch.exp(-row_m_bhl)) + eps)[..., None])
        # hand over to the next chunk
        total_bh = decay_bhl[..., -1]
        reach_bhl = total_bh[..., None] - decay_bhl + igate_bhl
        new_m_bh = torch.maximum(total_bh + m_bh, reach_bhl.amax(-1)).detach()
        keep_bh = torch.exp(total_bh + m_bh - new_m_bh)
        written_bhlk = torch.exp(reach_bhl - new_m_bh[..., None])[..., None] * k_bhlk
        c_bhkv = keep_bh[..., None, None] * c_bhkv + written_bhlk.transpose(-1, -2) @ v_bhlv
        n_bhk = keep_bh[..., None] * n_bhk + written_bhlk.sum(-2)
        m_bh = new_m_bh
    return torch.cat(outputs, dim=2), (c_bhkv, n_bhk, m_bh)
