"""Time GPTQ on SmolLM2-135M beside llmcompressor's: same weights, same samples, same format, each in a fresh process.

``make bench-solver`` makes the peer an environment of its own, as it wants another transformers, and runs the
contenders in turns: first one, then the other, as often as ``--rounds`` says; ``--blocks 4`` leaves only the first of
the model's 30 blocks. What is timed is quantizing alone, from the loaded model to the quantized one; the memory is what
is added to the loaded model at the worst moment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
WINDOW, GROUP = 512, 64  # compressed-tensors has no shorter last group, and 128 does not divide 576


def ours(net: Any, tokens: Tensor, scratch: str) -> tuple[Callable[[], Any], str]:
    """GPTQ as a callback of a Trainer that validates next to nothing."""
    import lightning as L
    from torch.utils.data import DataLoader

    from lightning_quant import GPTQ, LanguageModule, __version__

    model = LanguageModule(net)
    gptq = GPTQ(
        weights=f"int4_asym_g{GROUP}",
        ranges="minmax",  # as the peer has them
        attention=False,
        calibration_loader=DataLoader(tokens, batch_size=1),
        calibration_samples=len(tokens),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[gptq],
        default_root_dir=scratch,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return lambda: trainer.validate(model, DataLoader(tokens[:1, :2]), verbose=False), __version__


def llmcompressor(model: Any, tokens: Tensor, scratch: str) -> tuple[Callable[[], Any], str]:
    """Its sequential pipeline, without an order of its own for the columns, as ours has none by default."""
    from importlib.metadata import version

    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader

    os.chdir(scratch)  # it writes its log where it stands
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    recipe = GPTQModifier(
        config_groups={"linear": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        dampening_frac=0.01,
        block_size=128,
        actorder=None,
    )
    batches = [{"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]} for window in tokens]
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    return (
        lambda: oneshot(
            model=model,
            processor=object(),  # the windows are tokens already, but it insists
            dataset=loader,
            recipe=recipe,
            num_calibration_samples=len(tokens),
            max_seq_length=WINDOW,
            pipeline="sequential",
        ),
        version("llmcompressor"),
    )


CONTENDERS = {"lightning_quant": ours, "llmcompressor": llmcompressor}


def main() -> None:
    arguments = parse()
    if arguments.contender:
        print("\n" + json.dumps(run(arguments)))
        return
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    added: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as arguments.scratch:
        prepare(arguments.scratch, arguments.samples, arguments.blocks)
        for turn in range(arguments.rounds):
            for name in CONTENDERS:
                found = contend(name, arguments)
                seconds[name].append(found["seconds"])
                added[name].append(found["added_mb"])
                print(
                    f"round {turn + 1}: {name} {found['version']} took {found['seconds']:.1f} s, "
                    f"{found['core_seconds']:.1f} s of a core, and {found['added_mb']:.0f} MB beside the model",
                    flush=True,
                )
    own, peer = (statistics.median(times) for times in seconds.values())
    print(
        f"\nGPTQ of {arguments.blocks} blocks of SmolLM2-135M, int4 in groups of {GROUP}, "
        f"{arguments.samples} windows of {WINDOW} tokens, {arguments.threads} threads, torch {torch.__version__}\n"
        f"median: lightning_quant {own:.1f} s, llmcompressor {peer:.1f} s: {own / peer:.2f} of its time; memory beside "
        f"the model {statistics.median(added['lightning_quant']):.0f} MB and "
        f"{statistics.median(added['llmcompressor']):.0f} MB"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=sys.executable, help="the python that llmcompressor is installed for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--assets", help="models and data; default: $LIGHTNING_QUANT_ASSETS")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.assets:
        os.environ["LIGHTNING_QUANT_ASSETS"] = arguments.assets
    return arguments


def prepare(scratch: str, samples: int, blocks: int) -> None:
    """Write the tokens, and the first blocks of the model as if it had been published in float32."""
    from transformers import AutoModelForCausalLM

    from tests.real import smol_text, smollm2

    torch.save(smol_text("wikitext2_valid")[: samples * WINDOW].view(-1, WINDOW), f"{scratch}/tokens.pt")
    published = smollm2().net
    config = published.config
    config.num_hidden_layers = blocks
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(published.state_dict(), strict=False)
    model.save_pretrained(scratch)


def contend(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize in a process of its own."""
    python = sys.executable if name == "lightning_quant" else arguments.peer
    command = [python, __file__, "--contender", name, "--threads", str(arguments.threads)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command += ["--scratch", arguments.scratch]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} stopped: {done.stderr.strip().splitlines()[-1:]}; see --peer")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one contender, in this process."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_pretrained(arguments.scratch, dtype=torch.float32).eval()
    for parameter in net.parameters():  # what was read stands in a file yet, and would count when it is touched
        parameter.data = parameter.data.clone()
    tokens = torch.load(f"{arguments.scratch}/tokens.pt")
    quantize, version = CONTENDERS[arguments.contender](net, tokens, arguments.scratch)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began, worked = time.perf_counter(), time.process_time()
    quantize()
    return {
        "seconds": time.perf_counter() - began,
        "core_seconds": time.process_time() - worked,
        "added_mb": memory("VmHWM") - before,
        "version": version,
    }


def memory(entry: str) -> float:
    """What the system says of this process, in MB; ``VmHWM`` is the most since it was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(entry))


if __name__ == "__main__":
    main()
