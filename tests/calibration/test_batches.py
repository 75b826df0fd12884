from __future__ import annotations

import io
import logging
import multiprocessing
import random
import threading
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from rich.errors import LiveError
from rich.progress import Progress
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_quant.calibration import CalibrationBatches, undisturbed
from tests.calibration.runs import Net, Numbers, OnValidationStart, in_validate, labels, trainer_with


def drawn_labels(loader="auto", samples=10, **run):
    return in_validate(lambda trainer, module: labels(CalibrationBatches(trainer, module, loader, samples)), **run)


def source(loader="auto", samples=4, **run):
    return in_validate(lambda trainer, module: CalibrationBatches(trainer, module, loader, samples).source, **run)


class Counted(IterableDataset):
    """Endless unless ``size`` is given; remembers how many samples were asked for."""

    def __init__(self, size=None):
        self.size, self.asked = size, 0

    def __iter__(self):
        index = 0
        while self.size is None or index < self.size:
            self.asked += 1
            yield torch.full((3,), float(index)), index
            index += 1


class FitOnly(pl.LightningDataModule):
    """Makes its train set in ``setup("fit")`` only, as is usual."""

    def setup(self, stage):
        if stage == "fit":
            self.train_set = Numbers(20)

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=4)

    def val_dataloader(self):
        return DataLoader(Numbers(8, start=100), batch_size=4)


class TestWhereFrom:
    def test_auto_takes_the_train_set_unshuffled_and_cuts_the_last_batch(self):
        assert drawn_labels(samples=10) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert source() == "the train loader, unshuffled"

    def test_val_takes_the_validation_set(self):
        assert drawn_labels("val", samples=6) == [[100, 101, 102, 103], [104, 105]]

    def test_datamodule_not_set_up_for_fit_falls_to_validation_and_says_why(self):
        assert drawn_labels(samples=3, datamodule=FitOnly()) == [[100, 101, 102]]
        told = source(datamodule=FitOnly())
        assert told.startswith("the validation loader, unshuffled")
        assert "train_dataloader() failed with AttributeError: 'FitOnly' object has no attribute 'train_set'" in told

    def test_calibration_dataloader_comes_first_and_the_datamodule_before_the_module(self):
        class Module(Net):
            def calibration_dataloader(self):
                return DataLoader(Numbers(4, start=200), batch_size=4)

        class Data(FitOnly):
            def calibration_dataloader(self):
                return DataLoader(Numbers(4, start=300), batch_size=4)

        assert drawn_labels(samples=2, module=Module()) == [[200, 201]]
        assert drawn_labels(samples=2, module=Module(), datamodule=Data()) == [[300, 301]]
        assert source(module=Module(), datamodule=Data()) == "calibration_dataloader() of Data, unshuffled"

    def test_a_datamodule_of_an_earlier_run_is_forgotten(self):
        class Data(FitOnly):
            def calibration_dataloader(self):
                return DataLoader(Numbers(4, start=300), batch_size=4)

        callback = OnValidationStart(lambda trainer, module: CalibrationBatches(trainer, module, samples=2).source)
        trainer, module = trainer_with(callback), Net()
        trainer.validate(module, datamodule=Data(), verbose=False)
        trainer.validate(module, module.val_dataloader(), verbose=False)
        assert callback.result == "the train loader, unshuffled"

    @pytest.mark.parametrize("hook", ["on_predict_start", "on_test_start", "on_fit_start", "on_train_start"])
    def test_every_stage_reaches_the_train_set(self, hook):
        class Everywhere(Net):
            def test_step(self, batch, batch_idx): ...

            def predict_step(self, batch, batch_idx): ...

        callback = pl.Callback()
        seen = []
        setattr(
            callback, hook, lambda trainer, module: seen.extend(labels(CalibrationBatches(trainer, module, samples=3)))
        )
        stage = {"on_predict_start": "predict", "on_test_start": "test"}.get(hook, "fit")
        trainer = trainer_with(callback, max_epochs=1, limit_val_batches=0)
        data = () if stage == "fit" else (DataLoader(Numbers(4), batch_size=2),)
        getattr(trainer, stage)(Everywhere(), *data)
        assert seen == [[0, 1, 2]]

    def test_a_function_and_a_ready_list(self):
        batches = [(torch.ones(2, 3), torch.tensor([7, 8])), (torch.ones(2, 3), torch.tensor([9, 10]))]
        assert drawn_labels(batches, samples=3) == [[7, 8], [9]]
        assert drawn_labels(lambda: iter(batches), samples=3) == [[7, 8], [9]]

    def test_a_function_that_returns_a_generator_can_be_read_twice(self):
        def twice(trainer, module):
            batches = CalibrationBatches(trainer, module, lambda: (torch.ones(2, 3) * i for i in range(5)), samples=5)
            return [[batch.tolist() for batch in batches] for _ in range(2)]

        first, second = in_validate(twice)
        assert first == second
        assert [len(batch) for batch in first] == [2, 2, 1]

    def test_a_generator_read_twice_is_an_error_that_names_the_cure(self):
        def twice(trainer, module):
            batches = CalibrationBatches(trainer, module, (torch.ones(2, 3) for _ in range(2)), samples=4)
            return [list(batches) for _ in range(2)]

        with pytest.raises(ValueError, match="pass a function that returns a new one"):
            in_validate(twice)

    def test_of_several_validation_loaders_the_first(self):
        data = [DataLoader(Numbers(6, start=100), batch_size=4), DataLoader(Numbers(6, start=200), batch_size=4)]

        class Module(Net):
            def validation_step(self, batch, batch_idx, dataloader_idx=0): ...

        assert drawn_labels("val", 2, module=Module(), data=data) == [[100, 101]]
        assert source("val", module=Module(), data=data) == "the first of 2 validation loaders, unshuffled"

    @pytest.mark.parametrize("combined", [False, True])
    def test_several_train_loaders_are_passed_over_or_refused(self, combined):
        class Module(Net):
            def train_dataloader(self):
                loaders = {"a": DataLoader(Numbers(4)), "b": DataLoader(Numbers(4))}
                return CombinedLoader(loaders) if combined else loaders

        assert "it is a collection of 2 loaders" in source(module=Module())
        with pytest.raises(ValueError, match="the train loader cannot be used: it is a collection of 2 loaders"):
            source("train", module=Module())

    @pytest.mark.parametrize("loader", [[DataLoader(Numbers(2))], {"a": DataLoader(Numbers(2))}])
    def test_a_collection_of_loaders_is_refused(self, loader):
        with pytest.raises(TypeError, match="collection of loaders, but calibration draws from one"):
            source(loader)

    def test_no_loader_at_all_names_both_ways_out(self):
        class Bare(pl.LightningModule):
            def predict_step(self, batch, batch_idx): ...

        callback = pl.Callback()
        callback.on_predict_start = CalibrationBatches
        with pytest.raises(
            ValueError, match=r"no train_dataloader is defined.*calibration_loader.*calibration_dataloader"
        ):
            trainer_with(callback).predict(Bare(), DataLoader(Numbers(4)))

    @pytest.mark.parametrize("loader", ["trian", 5, Numbers(3)])
    def test_something_else_is_refused(self, loader):
        with pytest.raises((TypeError, ValueError), match="calibration_loader"):
            source(loader)

    def test_the_source_is_logged_once(self, caplog):
        caplog.set_level(logging.INFO)
        drawn_labels(samples=2)
        told = [record.message for record in caplog.records if "Calibration draws" in record.message]
        assert told == ["Calibration draws 2 samples from the train loader, unshuffled."]


class TestOrder:
    def test_a_subset_sampler_is_unshuffled_within_its_subset(self):
        class Module(Net):
            def train_dataloader(self):
                return DataLoader(Numbers(20), batch_size=3, sampler=SubsetRandomSampler([11, 3, 17, 5]))

        assert drawn_labels(samples=4, module=Module()) == [[11, 3, 17], [5]]

    def test_a_custom_batch_sampler_keeps_its_batches(self):
        class Buckets(BatchSampler):
            def __iter__(self):
                yield from ([1, 9], [2, 4, 6], [3])

            def __len__(self):
                return 3

        class Module(Net):
            def train_dataloader(self):
                data = Numbers(20)
                return DataLoader(data, batch_sampler=Buckets(RandomSampler(data), 2, False))

        assert drawn_labels(samples=4, module=Module()) == [[1, 9], [2, 4]]
        assert source(module=Module()) == "the train loader, in the order of its Buckets"

    def test_a_given_loader_keeps_its_own_shuffling_alike_in_each_pass(self):
        generator = torch.Generator().manual_seed(5)
        loader = DataLoader(Numbers(20), batch_size=4, shuffle=True, generator=generator)
        before = generator.get_state()

        def twice(trainer, module):
            batches = CalibrationBatches(trainer, module, loader, samples=8)
            return labels(batches), labels(batches), batches.source

        first, second, told = in_validate(twice)
        assert first == second
        assert sorted([label for batch in first for label in batch]) != list(range(8))
        assert told == "the DataLoader given, in the order of its RandomSampler"
        assert torch.equal(before, generator.get_state())

    def test_collate_function_subclass_and_dropped_last_batch(self):
        class Loader(DataLoader):
            def __init__(self, twice):
                super().__init__(
                    Numbers(5), 2, True, collate_fn=lambda rows: 2 * torch.stack([r[0] for r in rows]), drop_last=True
                )

            def __iter__(self):
                for batch in super().__iter__():
                    yield batch + 0.5

        loader = Loader(twice=True)
        with pytest.warns(UserWarning, match="has only 5 samples"):
            rows = in_validate(
                lambda trainer, module: torch.cat(list(CalibrationBatches(trainer, module, lambda: loader, samples=6)))
            )
        assert sorted(rows[:, 0].tolist()) == [0.5, 2.5, 4.5, 6.5, 8.5]
        assert len(loader) == 2


class TestTheWayOfABatch:
    @pytest.mark.parametrize("owner", ["module", "datamodule"])
    def test_transfer_hooks_run_in_order(self, owner):
        class Hooks:
            def on_before_batch_transfer(self, batch, dataloader_idx):
                return batch[0] + 1, batch[1]

            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch[0] * 2, batch[1]

        module = type("Module", (Hooks, Net), {}) if owner == "module" else Net
        data = type("Data", (Hooks, FitOnly), {}) if owner == "datamodule" else FitOnly

        def first(trainer, module):
            return next(iter(CalibrationBatches(trainer, module, samples=2)))[0]

        assert in_validate(first, module(), datamodule=data())[:, 0].tolist() == [202.0, 204.0]

    @pytest.mark.parametrize(
        ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("32-true", torch.float32)]
    )
    def test_inputs_have_the_precision_of_the_loops(self, precision, dtype):
        def first(trainer, module):
            return next(iter(CalibrationBatches(trainer, module, samples=2)))

        inputs, targets = in_validate(first, precision=precision)
        assert (inputs.dtype, targets.dtype) == (dtype, torch.int64)

    def test_batches_are_never_inference_tensors(self):
        def flags(trainer, module):
            made_inside = [(torch.ones(2, 3), torch.ones(2))]
            drawn = [
                batch[0]
                for loader in ("train", made_inside)
                for batch in CalibrationBatches(trainer, module, loader, 2)
            ]
            with undisturbed(module):
                drawn += [batch[0] for batch in CalibrationBatches(trainer, module, "train", 2)]
            return torch.is_inference_mode_enabled(), [tensor.is_inference() for tensor in drawn]

        assert in_validate(flags) == (True, [False, False, False])

    def test_the_modes_between_two_batches_are_the_callers(self):
        def modes(trainer, module):
            seen = []
            for _ in CalibrationBatches(trainer, module, samples=8):
                seen.append(torch.is_inference_mode_enabled())
                with torch.inference_mode(False), torch.enable_grad():
                    seen.append(torch.is_grad_enabled())
            return seen

        assert in_validate(modes) == [True] * 4


class TestHowMany:
    def test_drawn_total_and_length(self):
        def counts(trainer, module):
            batches = CalibrationBatches(trainer, module, samples=10)
            return batches.total, len(batches), [batches.drawn for _ in batches]

        assert in_validate(counts) == (10, 3, [4, 8, 10])

    def test_an_endless_loader_is_asked_for_no_more_than_needed(self):
        stream = Counted()
        loader = DataLoader(stream, batch_size=4)
        assert drawn_labels(loader, samples=10) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert stream.asked == 12

    def test_total_is_unknown_for_a_stream(self):
        def counts(trainer, module):
            batches = CalibrationBatches(trainer, module, DataLoader(Counted(), batch_size=4), samples=10)
            with pytest.raises(TypeError, match="does not tell how many batches"):
                len(batches)
            return batches.total, [batches.drawn for _ in batches]

        assert in_validate(counts) == (None, [4, 8, 10])

    def test_a_sized_loader_fetches_no_sample_too_many(self):
        fetched = []

        class Watched(Numbers):
            def __getitem__(self, index):
                fetched.append(index)
                return super().__getitem__(index)

        drawn_labels(DataLoader(Watched(20), batch_size=4), samples=5)
        assert fetched == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_short_loader_warns_once_with_both_counts(self, stream):
        loader = DataLoader(Counted(7) if stream else Numbers(7), batch_size=4)

        def twice(trainer, module):
            batches = CalibrationBatches(trainer, module, loader, samples=9)
            return [labels(batches) for _ in range(2)]

        with pytest.warns(
            UserWarning, match="calibration_samples=9, but the DataLoader given has only 7 samples"
        ) as told:
            result = in_validate(twice)
        assert result == [[[0, 1, 2, 3], [4, 5, 6]]] * 2
        assert len([one for one in told if "calibration_samples" in str(one.message)]) == 1

    @pytest.mark.parametrize("loader", [DataLoader(Numbers(0)), DataLoader(Counted(0)), []])
    def test_an_empty_loader_is_an_error(self, loader):
        with pytest.raises(ValueError, match=r"got no sample from .*, it is empty: pass calibration_loader"):
            drawn_labels(loader)

    def test_no_samples_asked_for_is_an_error(self):
        with pytest.raises(ValueError, match="calibration_samples must be at least 1, found 0"):
            drawn_labels(samples=0)


class TestMerged:
    def test_all_samples_in_one_batch(self):
        inputs, targets = in_validate(lambda t, m: CalibrationBatches(t, m, samples=10).merged())
        assert targets.tolist() == list(range(10))
        assert inputs.shape == (10, 3)
        assert not inputs.is_inference()

    def test_ragged_batches_name_shapes_and_cure(self):
        loader = [{"ids": torch.ones(2, 5)}, {"ids": torch.ones(2, 7)}]
        with pytest.raises(ValueError, match=r"\['ids'\] has the shapes \(2, 5\), \(2, 7\). Pad"):
            in_validate(lambda t, m: CalibrationBatches(t, m, loader, samples=4).merged())


class Noisy(Dataset):
    """Samples with random numbers of every kind in them."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(3) + random.random() + float(np.random.rand())


class TestNothingElseChanges:
    def test_random_numbers_of_the_run_and_fresh_ones_in_each_batch(self):
        def numbers(trainer, module):
            before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
            batches = CalibrationBatches(trainer, module, DataLoader(Noisy(), batch_size=1, shuffle=True), samples=3)
            passes = [torch.cat(list(batches)) for _ in range(2)]
            after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
            return torch.equal(before[0], after[0]), before[1:] == after[1:], passes

        torch_same, others_same, (first, second) = in_validate(numbers)
        assert torch_same
        assert others_same
        assert torch.equal(first, second)
        assert len(first.unique()) == first.numel()

    def test_the_loop_validates_on_the_same_batches_as_without(self):
        class Recording(Net):
            def validation_step(self, batch, batch_idx):
                self.seen = [*getattr(self, "seen", []), batch[1].tolist()]

        loader = DataLoader(Numbers(8), batch_size=4, persistent_workers=True, num_workers=1)
        module = Recording()
        assert drawn_labels("val", samples=6, module=module, data=loader) == [[0, 1, 2, 3], [4, 5]]
        assert module.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_a_loader_in_the_middle_of_its_own_pass_goes_on_there(self):
        loader = DataLoader(Numbers(8), batch_size=2, persistent_workers=True, num_workers=1)
        iterator = iter(loader)
        assert next(iterator)[1].tolist() == [0, 1]
        assert drawn_labels(loader, samples=4) == [[0, 1], [2, 3]]
        assert labels(iterator) == [[2, 3], [4, 5], [6, 7]]

    @pytest.mark.parametrize("stop", [None, KeyboardInterrupt])
    @pytest.mark.parametrize("data", [Numbers(100), Counted()])
    def test_worker_processes_are_gone(self, data, stop):
        loader = DataLoader(data, batch_size=2, num_workers=2, persistent_workers=True)

        def alive(trainer, module):
            others = set(multiprocessing.active_children()), set(threading.enumerate())
            batches = CalibrationBatches(trainer, module, loader, samples=6)
            try:
                for _ in batches:
                    during = len(set(multiprocessing.active_children()) - others[0])
                    if stop:
                        raise stop
            except KeyboardInterrupt:
                pass
            left = set(multiprocessing.active_children()) - others[0]
            threads = set(threading.enumerate()) - others[1]
            for thread in threads:
                thread.join(timeout=2)  # one that is just ending is still listed
            return during, left, [thread for thread in threads if thread.is_alive()], loader._iterator

        assert in_validate(alive) == (2, set(), [], None)


class TestProgressBar:
    @pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
    def test_it_lives_beside_lightnings_bar_inside_fit(self, bar, monkeypatch):
        console, _ = terminal(monkeypatch)
        callback = OnValidationStart(lambda t, m: labels(CalibrationBatches(t, m, samples=10)))
        trainer = trainer_with(callback, bar(), enable_progress_bar=True, max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(Net())
        assert callback.result == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert not console._live_stack

    def test_it_counts_samples_and_goes_away(self, monkeypatch):
        _, text = terminal(monkeypatch)
        in_validate(lambda t, m: labels(CalibrationBatches(t, m, samples=10)), enable_progress_bar=True)
        assert "Calibrating" in text.getvalue()
        assert "10/10" in text.getvalue()

    def test_where_rich_shows_one_live_bar_at_a_time_lightnings_stays(self, monkeypatch):
        _, text = terminal(monkeypatch)

        class Refused(Progress):
            def start(self):
                raise LiveError("Only one live display may be active at once")

        monkeypatch.setattr("lightning_quant.calibration.progress.Progress", Refused)
        drawn = in_validate(lambda t, m: labels(CalibrationBatches(t, m, samples=2)), enable_progress_bar=True)
        assert drawn == [[0, 1]]
        assert "Calibrating" not in text.getvalue()

    def test_nothing_is_shown_without_a_progress_bar(self, monkeypatch):
        _, text = terminal(monkeypatch)
        drawn_labels()
        assert text.getvalue() == ""


def terminal(monkeypatch):
    import rich
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setattr(rich, "reconfigure", lambda **options: None)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **options: None)
    return console, text


class Tokens(Numbers):
    def __getitem__(self, index):
        return {"x": super().__getitem__(index)[0], "name": f"sample {index}", "index": index}


@pytest.mark.slow
def test_two_ranks_share_the_samples_without_repetition_and_merge_to_the_same_batch(tmp_path):
    def buckets():
        return DataLoader(Numbers(9), batch_sampler=[[8, 7, 6], [5], [4, 3], [2, 1]])

    loaders = {
        "train": "train",
        "stream": lambda: DataLoader(Counted(), batch_size=4),
        "shuffled": lambda: DataLoader(Numbers(30), batch_size=3, shuffle=True),
        "buckets": buckets,
    }

    def collect(trainer, module):
        torch.manual_seed(trainer.global_rank)  # the ranks need not agree on random numbers
        result = {}
        for name, loader in loaders.items():
            batches = CalibrationBatches(trainer, module, loader, samples=10 if name != "buckets" else 7)
            result[name] = (labels(batches), batches.drawn, batches.merged())
        result["tokens"] = CalibrationBatches(
            trainer, module, DataLoader(Tokens(11), batch_size=3), samples=11
        ).merged()
        torch.save(result, tmp_path / f"{trainer.world_size}-{trainer.global_rank}.pt")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking, and about validating on more than one device
        in_validate(collect, strategy="ddp_fork", devices=2)
    in_validate(collect)
    alone, *ranks = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))

    assert [rank["train"][0] for rank in ranks] == [[[0, 2, 4, 6], [8]], [[1, 3, 5, 7], [9]]]
    assert [rank["stream"][0] for rank in ranks] == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]]
    assert [rank["stream"][1] for rank in ranks] == [6, 4]
    assert [rank["buckets"][0] for rank in ranks] == [[[8, 7, 6], [4, 3]], [[5], [2]]]
    shuffled = [[label for batch in rank["shuffled"][0] for label in batch] for rank in ranks]
    assert len(set(shuffled[0] + shuffled[1])) == 10
    for rank in ranks:
        assert rank["shuffled"][2][1].tolist() == [label for pair in zip(*shuffled, strict=True) for label in pair]
        for name in ("train", "stream", "buckets"):
            for mine, whole in zip(rank[name][2], alone[name][2], strict=True):
                assert torch.equal(mine, whole)
        assert torch.equal(rank["tokens"]["x"], alone["tokens"]["x"])
        assert rank["tokens"]["name"] == alone["tokens"]["name"] == [f"sample {index}" for index in range(11)]


class TestWhatLightningKeepsPrivate:
    """Each name that ``calibration/batches.py`` relies on; an upgrade that takes one away fails here and says so."""

    def test_the_loops_know_where_their_loaders_come_from(self):
        def sources(trainer, module):
            return trainer.fit_loop._data_source, trainer.validate_loop._data_source

        class Module(Net):
            val_dataloader = pl.LightningModule.val_dataloader

        module, data = Module(), DataLoader(Numbers(4))
        train, val = in_validate(sources, module, data)
        assert (train.instance, train.name, train.is_defined()) == (module, "train_dataloader", True)
        assert isinstance(train.dataloader(), DataLoader)
        assert val.is_defined()
        assert val.dataloader() is data

        datamodule = FitOnly()
        train, val = in_validate(sources, module, datamodule=datamodule)
        assert train.instance is datamodule
        assert val.instance is datamodule

    def test_the_module_passes_a_batch_to_whoever_has_the_hook(self):
        class Data(FitOnly):
            def on_before_batch_transfer(self, batch, dataloader_idx):
                return batch[0] + 1, batch[1]

        before, _ = in_validate(
            lambda t, m: m._on_before_batch_transfer((torch.zeros(1, 3), 0), dataloader_idx=0), datamodule=Data()
        )
        assert before.tolist() == [[1, 1, 1]]

    def test_torchs_loader_reads_what_its_copy_is_told(self):
        data = TensorDataset(torch.arange(4))
        assert {"batch_sampler", "persistent_workers", "generator"} <= vars(DataLoader(data)).keys()
        assert callable(iter(DataLoader(data, num_workers=1))._shutdown_workers)
