"""Checks for the exercises: each takes your answer and says what is right or wrong with it.

A check looks at shape, dtype, properties and values, in that order, and names the likely mistake.
An unanswered starter is told so and fails nothing. The answers are in `notebooks/solutions/`.
One module holds the checks of one chapter.
"""

from helpers.checks._core import CheckFailed, guard, is_unanswered
from helpers.checks.attention import (
    check_attention,
    check_attention_shapes,
    check_corrected_attention,
    check_decode,
    check_grouped_attention,
    check_softmax_gradient,
)
from helpers.checks.gpt import (
    check_layer_norm,
    check_own_generate,
    check_parallel_block,
    check_parameter_count,
    check_tied,
)
from helpers.checks.instruction import (
    check_attack,
    check_baseline,
    check_collate,
    check_targets,
    check_word_f1,
)
from helpers.checks.llama import (
    check_expand_kv_heads,
    check_kv_cache_bytes,
    check_load_meta,
    check_partial_rope,
    check_router,
)
from helpers.checks.long_runs import (
    check_data_position,
    check_early_stopping,
    check_interval,
    check_prune,
)
from helpers.checks.lora import (
    check_combine_adapters,
    check_dora,
    check_extract_lora,
    check_int8,
    check_lora_count,
)
from helpers.checks.overview import (
    check_back_off,
    check_smoothed_cross_entropy,
    check_train_filter,
    check_sparse_length,
    check_training_days,
)
from helpers.checks.pretraining import (
    check_groups,
    check_perplexity,
    check_schedule,
    check_step,
    check_top_p,
)
from helpers.checks.pytorch import (
    check_distances,
    check_division,
    check_log_sum_exp,
    check_numeric_gradient,
    check_training_step,
)
from helpers.checks.scaling import (
    check_budget,
    check_distributed_sampler,
    check_exact_orthogonal,
    check_global_gradient,
)
from helpers.checks.spam import (
    check_balanced_accuracy,
    check_merge_classes,
    check_naive_bayes,
    check_prevalence,
    check_threshold,
)
from helpers.checks.text import (
    check_all_windows,
    check_bytes_per_token,
    check_rotate,
    check_split_pattern,
    check_stream,
)

__all__ = [
    "CheckFailed",
    "check_attack",
    "check_baseline",
    "check_collate",
    "check_combine_adapters",
    "check_dora",
    "check_extract_lora",
    "check_int8",
    "check_lora_count",
    "check_all_windows",
    "check_attention",
    "check_attention_shapes",
    "check_back_off",
    "check_balanced_accuracy",
    "check_budget",
    "check_bytes_per_token",
    "check_data_position",
    "check_corrected_attention",
    "check_decode",
    "check_distances",
    "check_distributed_sampler",
    "check_division",
    "check_early_stopping",
    "check_exact_orthogonal",
    "check_global_gradient",
    "check_grouped_attention",
    "check_groups",
    "check_expand_kv_heads",
    "check_kv_cache_bytes",
    "check_load_meta",
    "check_partial_rope",
    "check_router",
    "check_interval",
    "check_layer_norm",
    "check_merge_classes",
    "check_naive_bayes",
    "check_log_sum_exp",
    "check_smoothed_cross_entropy",
    "check_targets",
    "check_train_filter",
    "check_numeric_gradient",
    "check_sparse_length",
    "check_own_generate",
    "check_parallel_block",
    "check_parameter_count",
    "check_perplexity",
    "check_prevalence",
    "check_prune",
    "check_rotate",
    "check_schedule",
    "check_softmax_gradient",
    "check_split_pattern",
    "check_step",
    "check_stream",
    "check_threshold",
    "check_tied",
    "check_top_p",
    "check_training_days",
    "check_training_step",
    "check_word_f1",
    "is_unanswered",
]

for _name in [name for name in __all__ if name.startswith("check_")]:
    globals()[_name] = guard(globals()[_name])      # no check ends in a traceback of its own
