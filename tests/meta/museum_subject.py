"""A museum that lies: exhibits that are right, and clean twins that are not."""


def B045(*, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    branches = len(seq_lens) * topk
    return [[branches + 1, topk * seq_lens_sum + branches * step] for step in range(1, num_steps)]


def B045_clean(*, seq_lens, seq_lens_sum, topk, num_steps, row_width):
    return [[len(seq_lens) * topk + 1, topk * seq_lens_sum] for _ in range(1, num_steps)]
