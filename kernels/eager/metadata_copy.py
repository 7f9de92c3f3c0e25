"""The metadata_copy family in plain PyTorch: one slice copy per buffer, as SGLang did before it fused them."""


def fused_metadata_copy(*, cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src,
                        seqlens_expanded_src, nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src,
                        flashmla_metadata_src, cache_seqlens_dst, cu_seqlens_k_dst, page_table_1_dst, nsa_cache_seqlens_dst,
                        seqlens_expanded_dst, nsa_cu_seqlens_k_dst, real_page_table_dst, flashmla_num_splits_dst,
                        flashmla_metadata_dst, forward_mode, bs, max_len, max_seqlen_k, seqlens_expanded_size):
    """One backend."""
    decode = forward_mode == 0
    n = bs if decode else seqlens_expanded_size
    pages = page_indices_src[:bs, :max_len] if decode else page_indices_src[:, :max_seqlen_k]
    pairs = [
        (cache_seqlens_dst, cache_seqlens_src[:bs]),
        (cu_seqlens_k_dst[1:], cu_seqlens_k_src[1 : bs + 1]),
        (page_table_1_dst, pages),
        (nsa_cache_seqlens_dst, nsa_cache_seqlens_src[:n]),
        (nsa_cu_seqlens_k_dst[1:], nsa_cu_seqlens_k_src[1 : n + 1]),
    ]
    if not decode:
        pairs.append((seqlens_expanded_dst, seqlens_expanded_src[:n]))
    if real_page_table_dst is not None:
        pairs.append((real_page_table_dst, real_page_table_src[: len(pages)]))
    if flashmla_num_splits_dst is not None:
        pairs.append((flashmla_num_splits_dst, flashmla_num_splits_src[: n + 1]))
    if flashmla_metadata_dst is not None:
        pairs.append((flashmla_metadata_dst, flashmla_metadata_src))
    _copy(pairs)


def fused_metadata_copy_multi(*, bs, max_len, seqlens_expanded_size, **tensors):
    """One backend after the other."""
    sources = {name: t for name, t in tensors.items() if name.endswith("_src")}
    for b in range(len(tensors["cache_seqlens_dst"])):
        backend = {name: group[b] for name, group in tensors.items() if name.endswith("_dst")}
        fused_metadata_copy(**sources, **backend, seqlens_expanded_src=None, seqlens_expanded_dst=None, forward_mode=0, bs=bs,
                            max_len=max_len, max_seqlen_k=-1, seqlens_expanded_size=seqlens_expanded_size)


def _copy(pairs):
    """Every source over its target's leading cells; nothing is written where one does not fit."""
    views = [(target[tuple(slice(n) for n in source.shape)], source) for target, source in pairs]
    for view, source in views:
        if view.shape != source.shape:
            raise ValueError(f"a destination has room for {tuple(view.shape)} of {tuple(source.shape)}")
    for view, source in views:
        view.copy_(source)
