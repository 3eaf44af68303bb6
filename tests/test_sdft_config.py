import math
import pickle

import pytest

from sdft.errors import UsageError
from sdft.settings import arguments
from sdft.settings.commands import EvalCommand, GenerateCommand, PlanCommand
from sdft.settings.config import EvalSettings, MethodSettings, SDFTConfig
from sdft.settings.idle import OF_EVAL, OF_GENERATE, OF_TRAINING, without_effect
from sdft.settings.inputs import EvalArguments, LoraArguments, ModelArguments


@pytest.mark.parametrize(
    ("field", "value", "may_be"),
    [
        ("method", "ppo", "sdft or sft"),
        ("divergence", "kl", "skew_reverse_kl or skew_forward_kl"),
        ("teacher", "other", "base, ema, live or model"),
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
        ("loss_temperature", math.nan, "from 1e-05 to 100000"),
        ("loss_temperature", math.inf, "from 1e-05 to 100000"),
        ("loss_temperature", 1e300, "from 1e-05 to 100000"),
        ("rollout_temperature", 0.0, "from 1e-05 to 100000"),
        ("rollout_temperature", 1e-300, "from 1e-05 to 100000"),
        ("eval_temperature", 1e-300, "from 1e-05 to 100000"),
        ("importance_clip", 1e39, "finite in float32"),
        ("max_chunk_bytes", 10**20, "at most 9223372036854775807"),
        ("freeze_embeddings", "false", "True or False"),
        ("teacher_offload", "false", "True or False"),
        ("activation_offload", "no", "True or False"),
        ("activation_checkpointing", "no", "True or False"),
        ("overwrite_output_dir", 0, "True or False"),
        ("max_steps", 0, "at least 1, or -1"),
        ("max_steps", -5, "at least 1, or -1"),
        ("max_steps", 2.5, "at least 1, or -1"),
        ("num_train_epochs", -1, "above 0"),
        ("num_train_epochs", math.nan, "above 0"),
        ("learning_rate", "1e-5", "at least 0"),
        ("learning_rate", 1e300, "finite in float32"),
        ("adam_beta1", 2.0, "at least 0 and below 1"),
        ("warmup_steps", -1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("seed", 10**20, "at most 4294967295"),
        ("save_steps", 0, "above 0"),
        ("dataloader_num_workers", -1, "at least 0"),
        ("gradient_accumulation_steps", None, "a number"),
        ("activation_checkpointing_kwargs", 3, "a mapping"),
        ("lr_scheduler_kwargs", "{", "a mapping"),
        ("accelerator_config", "absent.json", "a mapping, or a JSON file that is there"),
        ("accelerator_config", {"a": 1}, "unexpected keyword argument 'a'"),
        ("log_level", "nope", "warning"),
        ("debug", "x", "underflow_overflow or tpu_metrics_debug"),
        ("ddp_backend", "x", "nccl"),
        ("rollout_top_p", "0.9", "number"),
        ("rollout_top_k", -1, "at least 0"),
        ("rollout_min_p", 1.5, "from 0 to 1"),
        ("rollout_min_p", math.nan, "from 0 to 1"),
        ("rollout_stop", "\n", "list of texts"),
        ("rollout_stop", ["a", ""], "none of them empty"),
        ("eval_stop", "\n", "list of texts"),
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


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (ModelArguments, {"model": "x", "trust_remote_code": "false"}),
        (EvalCommand, {"teacher": "false"}),
        (PlanCommand, {"compare": "false"}),
    ],
)
def test_a_text_is_no_switch(settings, options):
    with pytest.raises(UsageError, match=f"^{list(options)[-1]} is 'false'; it must be True or False"):
        settings(**options)


def test_bf16_on_a_machine_without_such_a_gpu_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(UsageError, match="bf16 is True, and there is no GPU here that computes in it; use_cpu may be"):
        SDFTConfig(output_dir=str(tmp_path), bf16=True)


def test_a_live_teacher_cannot_be_offloaded(tmp_path):
    with pytest.raises(UsageError, match="teacher_offload is True; it is for teacher base, ema or model"):
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
        (
            {"method": "sft", "teacher": "ema", "ema_rate": 0.3},
            "teacher and ema_rate do nothing: method is 'sft'",
        ),
        (
            {"method": "sft", "divergence": "jsd", "beta": 0.3},
            "divergence and beta do nothing: method is 'sft' and base_kl_weight is 0.0",
        ),
        ({"base_kl_weight": 0.1}, "base_kl_weight is 0.1 and does nothing: method is 'sdft'"),
        (
            {"method": "sft", "base_kl_weight": 0.1, "rollout_top_p": 0.3},
            "rollout_top_p is 0.3 and does nothing: method is 'sft'",
        ),
        (
            {"importance_clip": 5.0},
            "importance_clip is 5.0 and does nothing: num_iterations is 1 and rollouts take no correction",
        ),
        ({"eval_steps": 5}, "eval_steps is 5 and does nothing: eval_strategy is 'no'"),
        ({"save_strategy": "no", "save_steps": 5}, "save_steps is 5 and does nothing: save_strategy is 'no'"),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "load_best_model_at_end is True and does nothing: eval_strategy is 'no'",
        ),
        ({"beta": 0.3, "divergence": "jsd", "ema_rate": 0.1, "teacher": "ema", "demonstration_weight": 0.1}, None),
        ({}, None),
    ],
)
def test_what_was_set_and_does_nothing_is_said(options, said, tmp_path):
    config = SDFTConfig(output_dir=str(tmp_path), **options)
    assert without_effect(OF_TRAINING, config, corrects=False) == ([said] if said else [])


@pytest.mark.parametrize(
    ("rules", "settings", "said"),
    [
        (OF_TRAINING, [LoraArguments(lora_alpha=3)], "lora_alpha is 3 and does nothing: lora_rank is 0"),
        (
            OF_TRAINING,
            [LoraArguments(lora_rank=2), MethodSettings(freeze_embeddings=True)],
            "freeze_embeddings is True and does nothing: lora_rank is 2",
        ),
        (
            OF_TRAINING,
            [EvalArguments(), EvalSettings(scorer="json", eval_temperature=1.0, eval_samples=3)],
            "scorer, eval_temperature and eval_samples do nothing: eval_file is not set",
        ),
        (
            OF_EVAL,
            [EvalCommand(teacher_template="turn")],
            "teacher_template is 'turn' and does nothing: teacher is False",
        ),
        (
            OF_EVAL,
            [EvalArguments(eval_file="x"), EvalCommand(base_model="m")],
            "base_model is 'm' and does nothing: general_file is not set",
        ),
        (OF_GENERATE, [GenerateCommand(prompt="a", seed=5)], "seed is 5 and does nothing: temperature is not set"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_does_nothing_beside_settings_of_other_kinds_is_said(rules, settings, said):
    assert without_effect(rules, *settings) == [said]
    assert without_effect(rules, *settings, only=["model"]) == []


def test_rules_name_settings_that_there_are(tmp_path):
    of_training = [LoraArguments(), EvalArguments(), SDFTConfig(output_dir=str(tmp_path))]
    of_eval = [EvalArguments(), EvalCommand()]
    for rules, settings in (
        (OF_TRAINING, of_training),
        (OF_EVAL, of_eval),
        (OF_GENERATE, [GenerateCommand(prompt="a")]),
    ):
        names = {name for each in settings for name in vars(each)} | {"corrects"}
        assert {name for group, beside in rules for name in (*group, *beside)} <= names


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
