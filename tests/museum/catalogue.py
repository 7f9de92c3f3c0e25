"""Which contract each exhibit stands in for, by which lane it is tried, and what must catch it.

A finding counts only if it is of the declared kind, a check and the buffer that it blames. `replays` are sessions on the
buffers of one capture, `serving` sessions that mix modes.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Bug:
    """A line of `bugs.csv`."""

    id: str
    priority: str
    upstream: str
    kind: str
    title: str


@dataclass(frozen=True)
class Exhibit:
    """`caught`: (check, buffer) of the findings that count."""

    id: str
    contract: str
    caught: tuple[tuple[str, str], ...]
    lane: str = "inside"


def bugs() -> dict[str, Bug]:
    """The denominator."""
    with (HERE / "bugs.csv").open(newline="") as lines:
        return {row["id"]: Bug(row["id"], row["priority"], row["upstream"], row["class"], row["title"])
                for row in csv.DictReader(lines)}


def _read(table: str) -> dict[str, Exhibit]:
    found = {}
    for line in table.strip().splitlines():
        name, contract, lane, kinds = (part.strip() for part in line.split("|"))
        assert name not in found, f"{name} is declared twice"
        found[name] = Exhibit(name, contract, tuple(tuple(k.strip().split(" ", 1)) for k in kinds.split(",")), lane)
    return found


EXHIBITS = _read("""
B001 | indexer_k_start_end | inside | states ks
B002 | topk_paged_chunked | inside | states topk_result
B003 | seqlens_expand | inside | states seqlens_expanded
B004 | paged_mqa_schedule | replays | states schedule
B005 | topk_transform_v2 | inside | states page_indices
B006 | fast_topk | inside | states indices
B008 | target_verify_metadata | inside | states seqlens_expanded
B009 | transform_index_page_table_prefill | inside | states result
B010 | target_verify_metadata | inside | states page_table_1
B011 | get_k_and_s | inside | memory page_indices read-outside
B012 | gather_page_table | inside | states page_table_1
B013 | get_k | inside | memory buf read-outside
B014 | pad_draft_extend_query | inside | memory q read-outside
B015 | transform_index_page_table_decode | inside | states result
B016 | topk_ragged_chunked | inside | memory lengths read-outside
B017 | cal_padded_tokens | inside | returned result
B020 | gather_page_table | replays | states page_table_1
B021 | page_table_1_flattened | inside | states page_table_1_flattened
B023 | paged_mqa_schedule | inside | memory schedule race
B024 | assign_extend_cache_locs_uniform | inside | states out_cache_loc
B025 | transform_index_page_table_prefill | inside | states result
B026 | decode_metadata | serving | states cache_seqlens
B027 | decode_metadata | replays | states cache_seqlens
B028 | real_page_table | replays | states real_page_table
B029 | assign_draft_cache_locs_contiguous | inside | states out_cache_loc
B031 | transform_index_page_table_decode | inside | states result
B033 | generate_draft_decode_kv_indices | inside | inputs positions
B037 | generate_draft_decode_kv_indices | inside | states kv_indices
B039 | real_page_table | inside | states real_page_table
B040 | generate_draft_decode_kv_indices | inside | states kv_indices
B041 | create_flashmla_kv_indices | inside | memory kv_indices write-outside
B042 | assign_draft_cache_locs_contiguous | inside | states out_cache_loc
B044 | draft_extend_metadata | inside | states cache_seqlens
B045 | draft_decode_slices | inside | returned result
B046 | decode_metadata | replays | states cache_seqlens
B047 | generate_draft_decode_kv_indices | replays | states kv_indptr
B048 | decode_metadata | inside | states cache_seqlens
B049 | draft_extend_metadata | replays | states cache_seqlens
B050 | set_k_and_s | inside | states buf
B052 | create_flashinfer_kv_indices | inside | memory read-outside nowhere
B053 | assign_extend_cache_locs | inside | states out_cache_loc
B054 | assign_extend_cache_locs | inside | states out_cache_loc
B058 | mla_metadata | inside | states cu_seqlens_q
B059 | draft_extend_metadata | inside | states page_table_1
B060 | flashmla_schedule | replays | states num_splits
B061 | decode_metadata | serving | states page_table_1
B064 | pad_sequence_with_mask | inside | states attn_mask
B065 | fast_topk | inside | states indices
B066 | assign_extend_cache_locs_uniform | inside | states positions_out
B067 | create_flashmla_kv_indices | inside | states kv_indices
B069 | nsa_cache_seqlens | inside | states nsa_cache_seqlens
B070 | gather_page_table | inside | states page_table_1
B071 | transform_index_page_table_prefill | inside | states result
B072 | decode_metadata | replays | states cache_seqlens
B075 | get_k_and_s | inside | states k_out
B076 | cu_seqlens_q | inside | states cu_seqlens_q
B077 | paged_mqa_schedule | inside | states schedule
B078 | indexer_k_start_end | inside | states ke
B080 | fast_topk | replays | states indices
B082 | create_flashmla_kv_indices | inside | states kv_indices
B085 | flashmla_schedule | inside | states tile_scheduler_metadata
B086 | flashmla_schedule | replays | states num_splits
B087 | mla_metadata_sizes | inside | returned result
B089 | target_verify_metadata | replays | states nsa_cache_seqlens
B091 | topk_transform_v2 | inside | states page_indices
B092 | create_flashmla_kv_indices | inside | states kv_indices
B093 | mla_block_table | inside | states block_table
B095 | mqa_logits | inside | states logits
B097 | paged_mqa_schedule | replays | states schedule
B099 | cp_round_robin_split_q_seqs_cpu | inside | returned result
B100 | mqa_logits_chunk_plan | inside | returned result
B103 | transform_index_ragged | inside | states result
B105 | gather_page_table | inside | memory req_to_token read-outside
B107 | fast_topk_transform_ragged | inside | states topk_indices_ragged
B109 | mqa_logits | inside | states logits
B110 | real_page_table | inside | memory page_table_1 read-outside
B111 | target_verify_metadata | inside | states cache_seqlens
B113 | fast_topk | inside | states indices
B114 | calc_padded_blocks | inside | returned result
B120 | fast_topk | inside | states indices
B121 | fast_topk_transform_ragged | inside | states topk_indices_ragged
B124 | dequantize_k_cache_paged | inside | memory quant_k_cache read-outside
B125 | flashmla_schedule | inside | states num_splits
B126 | set_k_and_s | inside | states buf
B127 | mqa_logits_chunk_plan | inside | returned result
B128 | max_seq_len_q | inside | returned result
B130 | cu_seqlens | inside | states cu_seqlens
B131 | flashmla_schedule | replays | states tile_scheduler_metadata
B132 | cu_seqlens_q | inside | states cu_seqlens_q
B134 | paged_mqa_walk | inside | memory context_lens read-outside
B135 | paged_mqa_schedule | inside | memory context_lens read-outside
B136 | assign_extend_cache_locs_uniform | inside | states out_cache_loc
B137 | get_k_and_s | inside | memory grid
B138 | create_flashmla_kv_indices | inside | states kv_indices
B139 | paged_mqa_walk | replays | states owner
B140 | should_chunk_mqa_logits | inside | returned result
B141 | pad_sequence_with_mask | inside | states output
B142 | gather_page_table | inside | memory req_to_token read-outside, memory req_to_token read-forbidden
B143 | cp_round_robin_split_rows | inside | memory x read-outside, memory split write-outside
B144 | get_s | inside | memory page_indices read-outside
B145 | create_extend_after_decode_spec_info | inside | states positions
B146 | paged_mqa_schedule | inside | states schedule
B150 | decode_metadata | serving | states page_table_1
B151 | gather_page_table | replays | states page_table_1
B152 | topk_transform_v2 | inside | states page_indices
B153 | nsa_cache_seqlens | inside | states nsa_cu_seqlens_k
B156 | fused_metadata_copy_multi | inside | states flashmla_metadata_dst
B160 | draft_extend_metadata | inside | states seqlens_expanded
B162 | create_extend_after_decode_spec_info | inside | states bonus_tokens
B163 | assign_draft_cache_locs_contiguous | inside | states out_cache_loc
B164 | mla_metadata | inside | states cu_seqlens_q
B165 | decode_metadata | inside | states cu_seqlens_k
B166 | target_verify_metadata | replays | states cu_seqlens_k
B168 | topk_indices_offset | inside | states topk_indices_offset
B169 | mla_block_table | inside | states block_table
""")

# Bugs between streams: judged on a GPU only.
GPU_ONLY = _read("""
B062 | cu_seqlens | inside | interference cu_seqlens
B104 | cp_round_robin_split | inside | states split
""")

NOT_EXPRESSIBLE = {
    "B096": "The split of a batch into decodes and prefills is the scheduler's; no contract of ours classifies requests.",
}
