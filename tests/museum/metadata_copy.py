"""One batch into the buffers of several backends."""

from exhibit import exhibit

LEADING = {"cu_seqlens_k": 1, "nsa_cu_seqlens_k": 1}  # index 0 is not copied
WIDE = ("page_indices", "real_page_table", "flashmla_metadata")


@exhibit("B156")
def plan_of_the_first_backend(faulty, *, bs, max_len, seqlens_expanded_size, **call):
    """TensorRT-LLM #18769. Trigger: 2 requests, two layer groups, replays. Symptom: all groups but the first keep the warm-up
    plan, whose other rows have one token."""
    for b in range(len(call["cache_seqlens_dst"])):
        for name in [n.removesuffix("_src") for n in call if n.endswith("_src")]:
            source = call[f"{name}_src"]
            target = call[f"{'page_table_1' if name == 'page_indices' else name}_dst"][b]
            if source is None or target is None or (faulty and b > 0 and name.startswith("flashmla")):
                continue
            if name == "flashmla_metadata":
                target[: source.shape[0], : source.shape[1]] = source
            elif name in WIDE:
                columns = max_len if name == "page_indices" else source.shape[1]
                target[:bs, :columns] = source[:bs, :columns]
            else:
                first, last = LEADING.get(name, 0), bs + ("cu_" in name or "splits" in name)
                target[first:last] = source[first:last]
