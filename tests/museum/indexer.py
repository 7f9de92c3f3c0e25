"""Key ranges of query tokens, and the shares of context-parallel ranks."""

import triton
import triton.language as tl

from exhibit import exhibit, put


def _ranges(extends, seqs, cp_size, cp_rank, advance=None, end=None):
    """(first key, end, request) of the rank's tokens. `advance`: by what a request moves the base; `end`: of one token."""
    answer, base, number, owners = [], 0, 0, 0
    for extend, seq in zip(extends, seqs):
        own = [j for j in range(extend) if (number + j) % cp_size == cp_rank]
        number += extend
        if own or cp_size == 1:
            answer += [(base, base + (seq - extend + j + 1 if end is None else seq), owners) for j in own]
            base += seq if advance is None else extend
            owners += 1
    return answer


def _store(answer, ks, ke, token_to_batch_idx):
    for out, column in zip((ks, ke, token_to_batch_idx), zip(*answer)):
        put(out, column)


@exhibit("B001")
def base_of_the_queries(faulty, *, extend_seq_lens, seq_lens, ks, ke, token_to_batch_idx, bs, total_len, cp_size, cp_rank):
    """SGLang #12583. Trigger: extend [3, 2] of sequences [10, 4], so a cached prefix and 2 requests. Symptom: ks is 3 where it
    must be 10: one counter serves queries and keys; accuracy falls."""
    extends, seqs = extend_seq_lens[:bs].tolist(), seq_lens[:bs].tolist()
    _store(_ranges(extends, seqs, cp_size, cp_rank, advance="queries" if faulty else None), ks, ke, token_to_batch_idx)


@exhibit("B078")
def length_of_the_request(faulty, *, extend_seq_lens, seq_lens, ks, ke, token_to_batch_idx, bs, total_len, cp_size, cp_rank):
    """vLLM #39542. Trigger: 2 query tokens per request. Symptom: the first sees the second's key."""
    extends, seqs = extend_seq_lens[:bs].tolist(), seq_lens[:bs].tolist()
    _store(_ranges(extends, seqs, cp_size, cp_rank, end="request" if faulty else None), ks, ke, token_to_batch_idx)


@exhibit("B099")
def one_token_of_nothing(faulty, *, extend_seq_lens, cp_size, cp_rank):
    """vLLM #27518. Trigger: nothing to share out, 2 ranks. Symptom: -1 modulo the ranks is the last rank, so each rank gets one
    token that does not exist."""
    def share(n):
        return n // cp_size + int(cp_rank <= (n - 1) % cp_size if faulty else cp_rank < n % cp_size)

    first, counts = 0, []
    for extend in extend_seq_lens:
        counts.append(share(first + extend) - share(first))
        first += extend
    chosen = [i for i, n in enumerate(counts) if n]
    return {"q_lens": [counts[i] for i in chosen], "bs_idx": chosen}


@triton.jit
def _rank_rows(x, out, x_row, x_step, out_row, out_step, cp_size, cp_rank, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    source = row * cp_size + cp_rank
    if WIDE:
        row, source = row.to(tl.int64), source.to(tl.int64)
    for block in range(0, columns, BLOCK):
        column = block + tl.arange(0, BLOCK)
        value = tl.load(x + source * x_row + column * x_step, mask=column < columns)
        tl.store(out + row * out_row + column * out_step, value, mask=column < columns)


@exhibit("B143")
def addresses_by_the_element_count(faulty, *, x, split, cp_size, cp_rank):
    """aiter #4774, #4673. Trigger: a view of few elements that lie far apart. Symptom: 32-bit addresses are chosen by the
    number of elements; past 2 GiB other rows are read, without fault or NaN."""
    def span(t):
        return t.numel() if faulty else sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1

    count = len(range(cp_rank, x.shape[0], cp_size))
    if count and x.shape[1]:
        _rank_rows[(count,)](x, split, *x.stride(), *split.stride(), cp_size, cp_rank, x.shape[1],
                             WIDE=max(span(x), span(split)) > 2**31 - 1, BLOCK=64)
