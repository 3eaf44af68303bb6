"""A run that saves every step, killed and resumed, many times: for test_sdft_robustness.

It is killed in turn at a random moment and amid one of its saves, a random one.

`python tests/killed_worker.py FOLDER TIMES SEED` prints a JSON line for each time. Importing everything takes longer
than such a run, so each is a child forked from a process that has imported it all and computed nothing.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from sdft import SDFTConfig, SDFTTrainer
from tests import tiny

STEPS = 6


def train(folder, resume):
    config = SDFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        max_completion_length=6,
        learning_rate=1e-2,
        teacher="ema",
        ema_rate=0.2,
        teacher_template="turn",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    run = SDFTTrainer(tiny.tiny_model(), config, train_dataset=tiny.rows(), processing_class=tiny.tiny_tokenizer())
    run.train(resume_from_checkpoint=resume)
    run.save_model()


def start(folder, resume=None):
    """The process id of a child that trains."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(folder, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(child, folder):
    _, status = os.waitpid(child, 0)
    if status != 0:
        sys.exit((folder / "log.txt").read_text())


def outcome(folder):
    """The bytes of what training left: the weights, and the teacher's average in the last checkpoint."""
    last = folder / f"checkpoint-{STEPS}"
    return [p.read_bytes() for p in (folder / "model.safetensors", last / "teacher_average.safetensors")]


def wait_for_a_save(child, folder, saves):
    """Returns amid the given save, counted from 1, or when the child has ended."""
    saving = folder / ".saving"
    for number in range(saves):
        while not saving.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            pass
        while number + 1 < saves and saving.exists():
            pass


def main(folder, times, seed):
    torch.set_num_threads(1)
    straight = folder / "straight"
    began = time.perf_counter()
    finish(start(straight), straight)
    whole = time.perf_counter() - began
    files = sorted(os.listdir(straight / f"checkpoint-{STEPS}"))
    moments = random.Random(seed)
    for number in range(times):
        killed = folder / f"killed-{number}"
        child = start(killed)
        began = time.perf_counter()
        if number % 2:
            wait_for_a_save(child, killed, moments.randint(1, STEPS))
        else:
            time.sleep(moments.uniform(0.15, 1) * whole)  # before that it has not begun
        moment = time.perf_counter() - began
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = get_last_checkpoint(killed)
        torn = [p.name for p in killed.glob("checkpoint-*") if sorted(os.listdir(p)) != files]
        saving = (killed / ".saving").exists()
        finish(start(killed, last), killed)
        report = {
            "moment": moment / whole,
            "last": last and Path(last).name,
            "torn": torn,
            "amid_saving": saving,
            "as_uninterrupted": outcome(killed) == outcome(straight),
            "left_over": (killed / ".saving").exists(),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
