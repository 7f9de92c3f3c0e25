"""The draft family in plain PyTorch: one gather or scatter each, over all requests at once."""

import torch


def _columns(start, count):
    """For every item of a ragged batch: whose it is, and its column."""
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    first = torch.cumsum(count, 0) - count
    return owner, start[owner] + torch.arange(len(owner), device=count.device) - first[owner]


def _ragged(req_pool_indices, start_offset, end_offset, bs):
    start = start_offset[:bs].long()
    owner, column = _columns(start, end_offset[:bs].long() - start)
    return req_pool_indices[:bs].long()[owner], column


def assign_req_to_token_pool(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs):
    """A scatter."""
    slot, column = _ragged(req_pool_indices, start_offset, end_offset, bs)
    req_to_token[slot, column] = out_cache_loc[: len(slot)].int()


def assign_extend_cache_locs(*, req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, bs):
    """A gather."""
    slot, column = _ragged(req_pool_indices, start_offset, end_offset, bs)
    out_cache_loc[: len(slot)] = req_to_token[slot, column].to(out_cache_loc.dtype)


def assign_extend_cache_locs_uniform(*, req_pool_indices, req_to_token, start_offset, out_cache_loc, positions_out, bs,
                                     draft_token_num):
    """A rectangle of columns."""
    columns = start_offset[:bs].long()[:, None] + torch.arange(draft_token_num, device=start_offset.device)
    locs = req_to_token[req_pool_indices[:bs].long()[:, None], columns]
    out_cache_loc[: locs.numel()] = locs.reshape(-1).to(out_cache_loc.dtype)
    if positions_out is not None:
        positions_out[:bs, :draft_token_num] = columns.to(positions_out.dtype)


def assign_draft_cache_locs_contiguous(*, req_pool_indices, req_to_token, seq_lens, out_cache_loc, positions, bs, topk,
                                       num_steps):
    """The same rectangle; positions repeat."""
    assign_extend_cache_locs_uniform(req_pool_indices=req_pool_indices, req_to_token=req_to_token, start_offset=seq_lens,
                                     out_cache_loc=out_cache_loc, positions_out=None, bs=bs, draft_token_num=topk * num_steps)
    if positions is not None:
        positions[: bs * topk] = seq_lens[:bs].repeat_interleave(topk).to(positions.dtype)


def create_extend_after_decode_spec_info(*, accept_tokens, seq_lens, accept_lens, positions, bonus_tokens, bs, num_steps):
    """The bonus token is the one in front of the next request's first."""
    accept, seq = accept_lens[:bs].long(), seq_lens[:bs].long()
    _, position = _columns(seq - accept, accept)
    positions[: len(position)] = position.to(positions.dtype)
    bonus_tokens[:bs] = accept_tokens[torch.cumsum(accept, 0) - 1].to(bonus_tokens.dtype)


def assign_draft_cache_locs(*, req_pool_indices, req_to_token, seq_lens, extend_lens, num_new_pages_per_topk, out_cache_loc,
                            source_cache_loc, target_cache_loc, last_page_lens_cumsum, bs, topk, num_steps, page_size):
    """Scatter, then gather every branch's columns back from the table."""
    seq, slot = seq_lens[:bs].long(), req_pool_indices[:bs].long()
    paged = page_size > 1 and topk > 1
    count = extend_lens[:bs].long() if paged else torch.full_like(seq, topk * num_steps)
    owner, column = _columns(seq, count)
    req_to_token[slot[owner], column] = out_cache_loc[: len(owner)].int()
    if not paged:
        return
    branch = torch.arange(topk, device=seq.device)
    apart = num_new_pages_per_topk[:bs].long()[:, None] * page_size * branch
    drafts = (seq[:, None] + apart)[:, :, None] + torch.arange(num_steps, device=seq.device)
    locs = req_to_token[slot[:, None, None], drafts].reshape(-1)
    out_cache_loc[: len(locs)] = locs.to(out_cache_loc.dtype)
    request = torch.arange(bs, device=seq.device).repeat_interleave(topk - 1)
    partial = (seq % page_size)[request]
    part, page = _columns(torch.zeros_like(partial), partial)
    own = (seq - seq % page_size)[request][part] + page
    copy = own + apart[:, 1:].reshape(-1)[part]
    source_cache_loc[: len(part)] = req_to_token[slot[request][part], own].to(source_cache_loc.dtype)
    target_cache_loc[: len(part)] = req_to_token[slot[request][part], copy].to(target_cache_loc.dtype)
