"""What each of several processes runs for test_sdft_processes: every case of CASES, its outcome left in a folder.

`python tests/process_worker.py FOLDER` trains in one process and `torch.distributed.run` or `accelerate launch` in
several, with a share of the same global batch each. With FSDP=1 in the environment the weights are sharded.
"""

import json
import os
import signal
import sys
import weakref
from pathlib import Path

import torch
from accelerate import state
from peft import LoraConfig
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from sdft import SDFTConfig, SDFTTrainer
from sdft.checkpoints.signals import FinishOnSignal
from sdft.feedback import Feedback
from sdft.processes import is_first, of_first, part, wait_for_all
from tests import tiny

GLOBAL_BATCH = 4
CASES = {
    "base": {"gradient_accumulation_steps": 2, "rollout_top_p": 0.9, "rollout_temperature": 0.9},
    "average": {"teacher": "ema", "ema_rate": 0.2, "save_strategy": "steps", "save_steps": 2},
    "sft": {"method": "sft", "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "live": {"teacher": "live", "loss_normalisation": "sequence", "demonstration_weight": 0.3, "eval_temperature": 1.0},
    "repeats": {
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "divergence": "forward_kl",
        "save_strategy": "steps",
        "save_steps": 1,
    },
    "best": {  # which is the first that is measured
        "method": "sft",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "forgetting",
    },
    "frozen embeddings": {"freeze_embeddings": True, "tied": True, "teacher": "ema"},
    "pieces": {"max_forward_tokens": 24, "demonstration_weight": 0.2},
    "adapter": {"lora": True, "learning_rate": 1e-2},
    "adapter's average": {
        "lora": True,
        "teacher": "ema",
        "ema_rate": 0.2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
    },
    "several rollouts": {"rollouts_per_prompt": 2, "teacher_cache_gib": 0.1},
    "another model": {"teacher": "model", "rollouts_per_prompt": 2, "teacher_cache_gib": 0.1},
    "feedback": {
        "feedback": "tests.process_worker:by_length",
        "rollouts_per_prompt": 2,
        "demonstration_weight": 0.2,
        "gradient_accumulation_steps": 2,
    },
    "mostly skipped": {"skip_tokens": 2, "gradient_accumulation_steps": 2},
}


def by_length(rollouts):
    """Feedback on each rollout by its length alone: some are left out, and others count more."""
    lengths = [len(rollout.completion) for rollout in rollouts]
    shown = [rollout.completion or "nothing" if n % 3 else None for rollout, n in zip(rollouts, lengths, strict=True)]
    return [Feedback(text, 1 + n / 4) for text, n in zip(shown, lengths, strict=True)]


WRAPPERS = []  # weak references to what DDP made of each trainer's model
RESUMED = {"average": 2, "adapter's average": 2, "sft": 2, "repeats": 1}  # from which step's checkpoint


def shard_on_the_cpu():
    """Let accelerate's FSDP2 work over gloo: it makes its choice for accelerators alone, and DDP of the rest."""
    prepare = state.AcceleratorState.__init__

    def prepared(self, *args, fsdp_plugin=None, **kwargs):
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = state.DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP

    state.AcceleratorState.__init__ = prepared


def trainer(folder, processes, **options):
    tied, lora = options.pop("tied", False), options.pop("lora", False)
    accumulation = options.get("gradient_accumulation_steps", 1)
    if os.environ.get("FSDP"):
        options["fsdp"] = True
        if options.get("method") == "sft":  # checkpoints in pieces; the saved model is whole all the same
            options["fsdp_config"] = {"state_dict_type": "SHARDED_STATE_DICT"}
        if options.get("teacher") == "ema" and not lora:  # whose names for parameters FSDP's own checkpointing changes
            options["fsdp_config"] = {"activation_checkpointing": True}
    config = SDFTConfig(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
            "max_steps": 4,
            "max_completion_length": 8,
            "learning_rate": 1e-3,
            "teacher_template": "turn",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    # An end-of-sequence token that is likely: rollouts, and with them the processes' tokens, differ in number.
    model = tiny.tiny_model(tied=tied)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 3
    rows = tiny.rows(16)
    return SDFTTrainer(
        model,
        config,
        train_dataset=rows,
        eval_dataset=rows[:5],
        general_dataset=[{"prompt": "x" * length} for length in (1, 7, 3)]
        if config.teacher == "live" or lora or config.load_best_model_at_end
        else None,
        processing_class=tiny.tiny_tokenizer(),
        teacher_model=tiny.tiny_model(5, hidden_size=48) if config.teacher == "model" else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )


def main(folder):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("FSDP"):
        shard_on_the_cpu()
    for name, options in CASES.items():
        finish(trainer(folder / name, processes, **options), folder / name)
    for name, step in RESUMED.items():
        again = trainer(folder / f"{name} resumed", processes, **CASES[name])
        finish(again, folder / f"{name} resumed", resume=str(folder / name / f"checkpoint-{step}"))

    stopped = trainer(folder / "stopped", processes, **{**CASES["average"], "save_strategy": "no"})
    with FinishOnSignal() as signalled:
        stopped.add_callback(signalled)
        finish(stopped, folder / "stopped", signal_in_step=3)  # amid whose rollouts it is left
    assert signalled.stopped and stopped.state.global_step == 2
    again = trainer(folder / "stopped resumed", processes, **CASES["average"])
    finish(again, folder / "stopped resumed", resume=str(folder / "stopped" / "checkpoint-2"))


def finish(run, folder, resume=None, signal_in_step=None):
    lengths = []
    sample = run.samples

    def samples(rows):
        last = run.args.process_index == run.args.world_size - 1  # one is told, and all are to stop
        if last and run.state.global_step + 1 == signal_in_step:
            signal.raise_signal(signal.SIGTERM)
        got = sample(rows)
        lengths.append([len(s.completion) for s in got])
        return got

    run.samples = samples
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    measured = list(run.evaluate().values())
    process = run.args.process_index
    (folder / f"lengths-{process}.json").write_text(json.dumps(lengths))
    if process == 0:
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        norms = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
        reach = [entry["out_of_reach"] for entry in run.state.log_history if "out_of_reach" in entry]
        history = {"losses": losses, "norms": norms, "measured": measured, "out_of_reach": reach}
        (folder / "history.json").write_text(json.dumps(history))
        if hasattr(run.teacher, "average"):
            save_file(run.teacher.average, folder / "average.safetensors")
    wait_for_all()
    assert of_first(process) == 0 and is_first() == (process == 0)
    if isinstance(run.model_wrapped, DistributedDataParallel):
        WRAPPERS.append(weakref.ref(run.model_wrapped))
    wrapped = type(run.model_wrapped).__mro__
    (folder / f"wrapped-{process}.json").write_text(json.dumps([kind.__name__ for kind in wrapped]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    part()
    # A wrapper that is kept keeps the process group, whose threads may abort a process that ends.
    assert not any(wrapper() is not None for wrapper in WRAPPERS)
