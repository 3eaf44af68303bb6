import math
import pickle

import pytest

from sdft.errors import UsageError
from sdft.settings.config import EvalSettings, ModelArguments, SDFTConfig


@pytest.mark.parametrize(
    ("field", "value", "may_be"),
    [
        ("method", "ppo", "sdft or sft"),
        ("divergence", "kl", "skew_reverse_kl or skew_forward_kl"),
        ("teacher", "other", "base, ema or live"),
        ("loss_normalisation", "batch", "token or sequence"),
        ("demonstration_weight", 1.0, "below 1"),
        ("num_iterations", 0, "at least 1"),
        ("importance_clip", 0.0, "above 0"),
        ("ema_interval", 0, "at least 1"),
        ("beta", 0.0, "from 0.001 to 0.999"),
        ("beta", 1.0, "from 0.001 to 0.999"),
        ("learning_rate", -1.0, "at least 0"),
        ("weight_decay", math.nan, "at least 0"),
        ("beta", 1e-6, "from 0.001 to 0.999"),
        ("demonstration_weight", 1.5, "from 0 to 1"),
        ("demonstration_weight", 1.0, "below 1, for at 1"),
        ("teacher_template", "trun", "did you mean 'turn'?"),
        ("ema_rate", 1.5, "above 0 and at most 1"),
        ("loss_temperature", math.nan, "above 0"),
        ("loss_temperature", math.inf, "above 0"),
        ("rollout_temperature", 0.0, "above 0"),
        ("rollout_top_p", "0.9", "number"),
        ("rollout_top_k", -1, "at least 0"),
        ("rollout_min_p", 1.5, "from 0 to 1"),
        ("rollout_min_p", math.nan, "from 0 to 1"),
        ("rollout_stop", "\n", "list of texts"),
        ("rollout_stop", ["a", ""], "none of them empty"),
        ("rollout_from", "base", "student or teacher"),
        ("rollout_backend", "vlm", "generate, continuous or vllm"),
        ("vllm_memory_share", 1.0, "above 0 and below 1"),
        ("rollouts_per_prompt", 0, "at least 1"),
        ("rollout_batch_size", 0, "at least 1, or auto"),
        ("rollout_batch_size", "many", "at least 1, or auto"),
        ("log_completions", -1, "at least 0"),
        ("skip_tokens", 1.5, "whole number"),
        ("skip_tokens", 256, "below max_completion_length"),
        ("max_completion_length", 0, "at least 1"),
        ("max_chunk_bytes", 0, "at least 1"),
        ("remove_unused_columns", True, "False"),
        ("teacher_template", "{prompt}", "{demonstration}"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("per_device_eval_batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("report_to", "nonesuch", "not installed; it may be none"),
        ("metric_for_best_model", "loss", "accuracy or forgetting"),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it(field, value, may_be, tmp_path):
    with pytest.raises(UsageError) as refused:
        SDFTConfig(output_dir=str(tmp_path), **{field: value})
    message = str(refused.value)
    assert message.startswith(f"{field} is ")
    assert may_be in message
    assert "\n" not in message


def test_defaults_are_valid_and_quiet(tmp_path):
    config = SDFTConfig(output_dir=str(tmp_path))
    assert config.report_to == []
    assert config.logging_nan_inf_filter is False
    assert config.rollout_top_p == 1.0  # on-policy: the distribution that the loss sees
    assert config.rollout_top_k == 0


def test_a_pickled_configuration_has_no_secret(tmp_path):
    config = SDFTConfig(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(config) and config.hub_token == "hf_secret"
    assert pickle.loads(pickle.dumps(config)).learning_rate == config.learning_rate


def test_model_and_evaluation_settings_are_checked():
    with pytest.raises(UsageError, match="model is not set"):
        ModelArguments()
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        ModelArguments(model="x", dtype="int8")
    with pytest.raises(UsageError, match="eval_completion_length is 0"):
        EvalSettings(eval_completion_length=0)


def test_a_live_teacher_cannot_be_offloaded(tmp_path):
    with pytest.raises(UsageError, match="teacher_offload is True; it is for teacher base or ema"):
        SDFTConfig(output_dir=str(tmp_path), teacher="live", teacher_offload=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.3}, "beta is 0.3 and does nothing: divergence is 'reverse_kl'"),
        ({"ema_rate": 0.1}, "ema_rate is 0.1 and does nothing: teacher is 'base'"),
        ({"ema_interval": 2}, "ema_interval is 2 and does nothing: teacher is 'base'"),
        (
            {"demonstration_weight": 0.1, "method": "sft"},
            "demonstration_weight is 0.1 and does nothing: method is 'sft'",
        ),
        ({"beta": 0.3, "divergence": "jsd", "ema_rate": 0.1, "teacher": "ema", "demonstration_weight": 0.1}, None),
        ({}, None),
    ],
)
def test_what_was_set_and_does_nothing_is_said(options, said, tmp_path):
    assert SDFTConfig(output_dir=str(tmp_path), **options).without_effect() == ([said] if said else [])


@pytest.mark.parametrize("options", [{"teacher": "ema"}, {"method": "sft"}, {"teacher_offload": True}], ids=str)
def test_prompts_are_kept_for_a_frozen_teacher_on_the_device_alone(options, tmp_path):
    with pytest.raises(
        UsageError, match=r"teacher_cache_gib is 1.5; it must be 0 where (teacher|method|teacher_offload) is "
    ):
        SDFTConfig(output_dir=str(tmp_path), teacher_cache_gib=1.5, **options)


@pytest.mark.parametrize(
    ("options", "metric", "greater"),
    [
        ({}, None, None),
        ({"metric_for_best_model": "forgetting"}, "forgetting", False),
        ({"metric_for_best_model": "eval_forgetting"}, "forgetting", False),
        ({"metric_for_best_model": "eval_accuracy"}, "accuracy", True),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, "accuracy", False),
        ({"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}, "accuracy", True),
    ],
    ids=str,
)
def test_the_best_model_answers_the_most_or_has_forgotten_the_least(options, metric, greater, tmp_path):
    config = SDFTConfig(output_dir=str(tmp_path), **{"eval_steps": 500, **options})
    assert (config.metric_for_best_model, config.greater_is_better) == (metric, greater)


def test_a_schedule_that_waits_for_a_metric_knows_which_way_is_better(tmp_path):
    options = {"output_dir": str(tmp_path), "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    assert SDFTConfig(**options).lr_scheduler_kwargs == {"mode": "max"}
    forgetting = SDFTConfig(**options, metric_for_best_model="forgetting", lr_scheduler_kwargs={"patience": 2})
    assert forgetting.lr_scheduler_kwargs == {"mode": "min", "patience": 2}
