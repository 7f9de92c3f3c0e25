"""The kv_indices family in plain PyTorch: gathers by index arithmetic, without a loop over requests."""

import torch


def _owners(counts):
    """For every item of a ragged list: whose it is, and its number within the owner."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    first = torch.cumsum(counts, 0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - first[owner]


def create_flashinfer_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_indptr, kv_start_idx, kv_indices,
                                 bs):
    """One gather, one scatter."""
    owner, token = _owners(paged_kernel_lens[:bs].long())
    start = 0 if kv_start_idx is None else kv_start_idx[:bs].long()[owner]
    tokens = req_to_token[req_pool_indices[:bs].long()[owner], start + token]
    kv_indices[kv_indptr[:bs].long()[owner] + token] = tokens.to(kv_indices.dtype)


def create_flashmla_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, kv_start_idx, kv_indices, bs, page_size):
    """The same on every page's first token."""
    owner, page = _owners((paged_kernel_lens[:bs].long() + page_size - 1) // page_size)
    owner, page = owner[page < kv_indices.shape[1]], page[page < kv_indices.shape[1]]
    start = 0 if kv_start_idx is None else kv_start_idx[:bs].long()[owner]
    kv_indices[owner, page] = req_to_token[req_pool_indices[:bs].long()[owner], start + page * page_size] // page_size


def generate_draft_decode_kv_indices(*, req_to_token, req_pool_indices, paged_kernel_lens, positions, kv_indices, kv_indptr,
                                     num_seqs, topk, num_steps, page_size):
    """Step by step one ragged list over all branches; a token past the request's own is looked up in its branch's pages."""
    lens = paged_kernel_lens[:num_seqs].long().repeat_interleave(topk)
    slots = req_pool_indices[:num_seqs].long().repeat_interleave(topk)
    branch = torch.arange(topk, device=lens.device).repeat(num_seqs)
    used = lens % page_size
    whole = (used + num_steps + page_size - 1).div(page_size, rounding_mode="floor") * page_size
    shift = branch * (num_steps if page_size == 1 or topk == 1 else whole)
    for step in range(1, num_steps + 1):
        owner, token = _owners(lens + step)
        column = token + torch.where(token < lens[owner], 0, shift[owner])
        fits = torch.arange(len(owner), device=lens.device) < kv_indices.shape[1]
        tokens = req_to_token[slots[owner][fits], column[fits]]
        kv_indices[step - 1, : len(tokens)] = tokens.to(kv_indices.dtype)
        ends = torch.cumsum(positions[: num_seqs * topk].long() + step, 0)
        kv_indptr[step - 1, 1 : num_seqs * topk + 1] = ends.int()


def draft_decode_slices(*, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    """The last entry of each step's prefix sums."""
    lens = torch.tensor(seq_lens, dtype=torch.int64).repeat_interleave(topk)
    totals = [int((lens + step).sum()) for step in range(1, num_steps + 1)]
    if seq_lens_sum * topk != int(lens.sum()):
        raise ValueError(f"seq_lens_sum is {seq_lens_sum}")
    if row_width < totals[-1]:
        raise ValueError(f"row_width is {row_width}")
    return [[len(lens) + 1, total] for total in totals[:-1]]
