"""The page_table family in plain PyTorch: a second opinion on the oracles, and the baseline of the kernels."""

import torch


def gather_page_table(*, req_to_token, req_pool_indices, cache_seqlens, row_repeats, bs_idx, page_table_1, bs, total_rows,
                      draft_tokens, max_len):
    """One advanced index for all rows, and a mask for the live prefixes."""
    owners = torch.arange(bs, device=req_to_token.device) if bs_idx is None else bs_idx.long()
    repeats = draft_tokens if row_repeats is None else row_repeats[:bs].long()[owners]
    owners = owners.repeat_interleave(repeats)
    rows = req_to_token[req_pool_indices[:bs].long()[owners], :max_len]
    live = torch.arange(max_len, device=rows.device) < cache_seqlens[:bs].long()[owners, None]
    page_table_1[:total_rows, :max_len][live] = rows[live]


def real_page_table(*, page_table_1, real_page_table, page_size):
    """A strided slice, divided."""
    rows, columns = page_table_1.shape
    pages = -(-columns // page_size)
    real_page_table[:rows, :pages] = torch.div(page_table_1[:, ::page_size], page_size, rounding_mode="floor")


def page_table_1_flattened(*, page_table_1, seq_lens, page_table_1_flattened, bs, max_len, total_len):
    """The cells under a mask, in row-major order."""
    live = torch.arange(max_len, device=page_table_1.device) < seq_lens[:bs, None]
    page_table_1_flattened[:total_len] = page_table_1[:bs, :max_len][live]


def topk_indices_offset(*, cu_seqlens_k, extend_seq_lens, topk_indices_offset, bs, total_len):
    """The owner of each token is found among the sums of the query lengths."""
    ends = torch.cumsum(extend_seq_lens[:bs], 0)
    owners = torch.searchsorted(ends, torch.arange(total_len, device=ends.device), right=True)
    topk_indices_offset[:total_len] = cu_seqlens_k[owners]


def cu_seqlens_q(*, extend_seq_lens, cu_seqlens_q, mode, bs, draft_tokens, extend_num_tokens):
    """Prefix sums of the lengths of the mode."""
    if mode == "extend":
        lengths = extend_seq_lens[:bs]
    else:
        lengths = torch.ones({"decode": bs, "target_verify": bs * draft_tokens}.get(mode, extend_num_tokens))
    cu_seqlens_q[0] = 0
    cu_seqlens_q[1 : len(lengths) + 1] = torch.cumsum(lengths, 0, dtype=torch.int32)


def max_seq_len_q(*, mode, extend_seq_lens, extend_prefix_lens, max_seq_len_k, round_robin):
    """The same choice on tensors."""
    prefixed = round_robin or bool(torch.tensor(extend_prefix_lens).gt(0).any())
    longest = int(torch.tensor(extend_seq_lens, dtype=torch.int64).max()) if extend_seq_lens else 1
    return 1 if mode != "extend" else longest if prefixed else max_seq_len_k
