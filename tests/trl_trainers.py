"""TRL's trainers and ours, given the same tiny models, rows and seeds: what test_integrations_trl compares.

`python tests/trl_trainers.py FOLDER` trains with TRL's classes and with ours, in as many processes as
`torch.distributed.run` starts, and leaves there what they logged and learnt.
"""

import copy
import os
import sys
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from sdft.processes import part
from sdft_kernels.integrations import trl as ours
from sdft_kernels.integrations.transformers import fused_causal_lm_loss
from tests import tiny
from tests.process_worker import shard_on_the_cpu

FULL = {"distillation_mode": "full_logits"}
#: For each trainer: TRL's class, ours, its configuration, and settings with which both compute the same.
TRAINERS = {
    "sdft": (SDFTTrainer, ours.FusedSDFTTrainer, SDFTConfig, {**FULL, "num_generations": 2}),
    "sdpo": (SDPOTrainer, ours.FusedSDPOTrainer, SDPOConfig, {**FULL, "num_generations": 2}),
    "gkd": (GKDTrainer, ours.FusedGKDTrainer, GKDConfig, {}),
    "distillation": (DistillationTrainer, ours.FusedDistillationTrainer, DistillationConfig, {}),
    "gold": (GOLDTrainer, ours.FusedGOLDTrainer, GOLDConfig, {"use_uld_loss": False}),
    "iw_opd": (IWOPDTrainer, ours.FusedIWOPDTrainer, IWOPDConfig, {"distillation_objective": "jsd", "loss_top_k": 0}),
}
#: In two processes: one trainer of each module of ours, and one whose loss is of sampled tokens, with its settings.
IN_TWO = {
    "sdft": {},
    "sdpo": {"distillation_mode": "sampled_token", "distillation_weight": 0.4},
    "gkd": {},
    "distillation": {},
}
#: Whether each of the two has a part of each weight.
SHARDED = bool(os.environ.get("FSDP"))
LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)


def config(name, folder, **options):
    kind, settings = TRAINERS[name][2:]
    common = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_new_tokens" if name == "gkd" else "max_completion_length": 8,
    }
    return kind(**{**common, **settings, **options})


def rows(name):
    """Eight rows with prompts and answers of many lengths, in the columns that the trainer reads."""
    texts = [("say " + "xy" * n, "answer " + "ab" * (7 * n % 5 + 1)) for n in range(8)]
    if name in ("gkd", "gold", "iw_opd"):
        return [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
            for prompt, answer in texts
        ]
    prompts = [[{"role": "user", "content": prompt}] for prompt, _ in texts]
    return [{"prompt": p, "privileged_context": answer} for p, (_, answer) in zip(prompts, texts, strict=True)]


def lengths(completions, **_):
    """A reward for every other length, so that some rollouts succeed."""
    return [float(len(str(completion)) % 2) for completion in completions]


def byte_tokenizer():
    """One token a byte, which GOLD asks for."""
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    return tokenizer


VOCABULARY = 264


def save_models(folder):
    """A student, which TRL reads again to have it teach itself, and a teacher of another width."""
    for number, name in enumerate(("student", "teacher")):
        model = tiny.tiny_model(
            seed=number, vocab_size=VOCABULARY, hidden_size=32 + 8 * number, initializer_range=0.1 + 0.1 * number
        )
        model.generation_config.eos_token_id = list(range(1, 40))  # so that rollouts end early, and not together
        tiny.saved(folder / name, model, byte_tokenizer())


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def build(name, folder, kind, lora=False, **options):
    """A trainer of the class, which starts from the models in the folder."""
    arguments = {
        "args": config(name, folder, **options),
        "train_dataset": Dataset.from_list(rows(name)),
        "processing_class": AutoTokenizer.from_pretrained(folder / "student"),
        "peft_config": copy.deepcopy(LORA) if lora else None,
    }
    if "eval_strategy" in options:
        arguments["eval_dataset"] = arguments["train_dataset"]
    if name == "sdpo":
        arguments["reward_funcs"] = lengths
    if name not in ("sdft", "sdpo"):
        arguments["teacher_model"] = loaded(folder / "teacher")
    return kind(loaded(folder / "student"), **arguments)


def learnt(trainer):
    """What a training logged, but for times, and the weights it left."""
    trainer.train()
    logged = [
        {key: value for key, value in entry.items() if not any(word in key for word in ("time", "second", "runtime"))}
        for entry in trainer.state.log_history
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    whole = {name: weight.full_tensor() if SHARDED else weight for name, weight in trained.items()}
    return {"logged": logged, "weights": whole}


def of_labels(folder, fused):
    """transformers' own Trainer, on rows with labels of many lengths."""
    model = loaded(folder / "student")
    if fused:
        fused_causal_lm_loss(model)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(folder / "out"), learning_rate=0.1, optim="sgd", fsdp=SHARDED, **options, **quiet)
    tokens = torch.randint(4, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(3))
    labels = [torch.where(torch.arange(12) < 3 + n, row, -100) for n, row in enumerate(tokens)]
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    return Trainer(model, args, train_dataset=rows)


def main(folder):
    if SHARDED:
        shard_on_the_cpu()
    for name, settings in IN_TWO.items():
        theirs, fused, *_ = TRAINERS[name]
        for kind in (theirs, fused):
            trainer = build(name, folder, kind, gradient_accumulation_steps=2, fsdp=SHARDED, **settings)
            found = learnt(trainer)
            assert trainer.accelerator.num_processes == 2
            assert ("FSDP" in type(trainer.model).__name__) == SHARDED
            if trainer.accelerator.is_main_process:
                torch.save(found, folder / f"{name}-{'ours' if kind is fused else 'theirs'}.pt")
    for whose in ("theirs", "ours"):
        trainer = of_labels(folder, whose == "ours")
        found = learnt(trainer)
        if trainer.accelerator.is_main_process:
            torch.save(found, folder / f"labels-{whose}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    part()
