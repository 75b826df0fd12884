from __future__ import annotations

import warnings

import pytest
import torch

from lightning_quant.calibration import merge_across_ranks
from tests.calibration.runs import in_validate


def test_without_a_process_group_it_is_a_list_of_one_and_the_same_object():
    states = {"layer": torch.ones(2)}
    assert merge_across_ranks(states)[0] is states


@pytest.mark.slow
def test_every_rank_gets_all_states_in_rank_order(tmp_path):
    def gather(trainer, module):
        rank = trainer.global_rank
        states = {"layer": {"max": torch.tensor(float(rank)), "seen": {f"rank {rank}"}, "rows": [torch.ones(rank)]}}
        torch.save((merge_across_ranks(states), merge_across_ranks(f"rank {rank}")), tmp_path / f"{rank}.pt")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking, and about validating on more than one device
        in_validate(gather, strategy="ddp_fork", devices=2)
    for rank in range(2):
        states, names = torch.load(tmp_path / f"{rank}.pt")
        assert names == ["rank 0", "rank 1"]
        assert [state["layer"]["max"].item() for state in states] == [0, 1]
        assert [state["layer"]["seen"] for state in states] == [{"rank 0"}, {"rank 1"}]
        assert [len(state["layer"]["rows"][0]) for state in states] == [0, 1]
