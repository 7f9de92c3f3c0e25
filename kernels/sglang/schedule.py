"""SGLang's schedules come from CUDA kernels: DeepGEMM's, FlashMLA's, and its own two for DeepSeek V4."""

from . import _upstream

VERSION = _upstream.version()
MISSING = {
    "paged_mqa_schedule": "get_paged_mqa_logits_metadata is a CUDA kernel, of DeepGEMM or of SGLang's JIT",
    "paged_mqa_walk": "the consumer is part of DeepGEMM's CUDA kernel",
    "flashmla_schedule": "get_mla_metadata and flashmla_sched_meta are CUDA kernels",
}
