"""Which samples a process sees, and the seeds of all draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dataset.sampling import BatchStream, resumed_batch
from utils.errors import InputError
from utils.seeding import Stream, numpy_generator, torch_generator

Batch = list[tuple[int, int]]


def global_batches(
    num_samples: int, batch_size: int, num_processes: int, stop: int, seed: int = 0, start: int = 0
) -> list[Batch]:
    """The batches of all processes, joined in the order of their ranks."""
    shares = [
        list(BatchStream(num_samples, batch_size, seed, index, num_processes, start, stop))
        for index in range(num_processes)
    ]
    return [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize("num_samples", [6, 12, 13, 40])
@pytest.mark.parametrize("num_processes", [2, 3, 6])
def test_any_number_of_processes_sees_the_same_global_batches(num_samples: int, num_processes: int) -> None:
    one = global_batches(num_samples, 6, 1, stop=20)
    assert global_batches(num_samples, 6 // num_processes, num_processes, stop=20) == one


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 19, 20])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stream_starts_anywhere(start: int, num_processes: int) -> None:
    full = global_batches(11, 2, num_processes, stop=20)
    assert global_batches(11, 2, num_processes, stop=20, start=start) == full[start:]


@pytest.mark.parametrize(("num_samples", "batch_size"), [(12, 4), (12, 1), (7, 7), (100, 10)])
def test_an_epoch_is_a_permutation(num_samples: int, batch_size: int) -> None:
    per_epoch = num_samples // batch_size
    batches = global_batches(num_samples, batch_size, 1, stop=3 * per_epoch)
    orders = []
    for epoch in range(3):
        seen = list(itertools.chain(*batches[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert {number for number, _ in seen} == {epoch}
        orders.append([index for _, index in seen])
        assert sorted(orders[-1]) == list(range(num_samples))
    assert len({tuple(order) for order in orders}) == 3


def test_what_is_left_over_waits_and_nothing_repeats_within_an_epoch() -> None:
    stream = BatchStream(11, 2, seed=0, num_processes=2, stop=400)
    assert (stream.global_batch_size, stream.batches_per_epoch) == (4, 2)
    counts = np.zeros(11, int)
    for epoch, batches in itertools.groupby(global_batches(11, 2, 2, stop=400), key=lambda batch: batch[0][0]):
        seen = [index for batch in batches for _, index in batch]
        assert len(seen) == len(set(seen)) == 8, epoch
        counts[seen] += 1
    assert counts.min() > 100  # of 145 on average: no picture is left out for good


@pytest.mark.parametrize(("num_samples", "batch_size", "num_processes"), [(3, 8, 1), (3, 4, 2), (3, 2, 3), (5, 4, 4)])
def test_a_small_data_set_is_repeated_to_fill_a_batch(num_samples: int, batch_size: int, num_processes: int) -> None:
    for epoch, batch in enumerate(global_batches(num_samples, batch_size, num_processes, stop=4)):
        assert len(batch) == batch_size * num_processes
        assert {number for number, _ in batch} == {epoch}
        counts = np.bincount([index for _, index in batch], minlength=num_samples)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


def test_the_order_depends_on_the_seed() -> None:
    assert global_batches(50, 5, 1, stop=10, seed=1) == global_batches(50, 5, 1, stop=10, seed=1)
    assert global_batches(50, 5, 1, stop=10, seed=1) != global_batches(50, 5, 1, stop=10, seed=2)


def test_the_length_is_the_number_of_batches() -> None:
    stream = BatchStream(11, 2, seed=0, start=3, stop=10)
    assert len(stream) == len(list(stream)) == 7
    assert list(stream) == list(stream)


def test_a_stream_drives_a_loader_with_worker_processes() -> None:
    stream = BatchStream(6, 2, seed=0, stop=5)
    loader = torch.utils.data.DataLoader(KeyEcho(), batch_sampler=stream, num_workers=1, collate_fn=list)
    assert list(loader) == list(stream)


class KeyEcho(torch.utils.data.Dataset[tuple[int, int]]):
    """Returns the key it is asked for."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


# Resuming with another global batch size


@pytest.mark.parametrize("batches_seen", [0, 1, 11, 12, 13, 500])
def test_an_equal_batch_size_goes_on_at_the_same_batch(batches_seen: int) -> None:
    assert resumed_batch(batches_seen, 8, 8, 100) == batches_seen


@pytest.mark.parametrize(
    ("batches_seen", "old", "new", "num_samples", "expected"),
    [
        (0, 8, 16, 96, 0),
        (12, 8, 16, 96, 6),  # an epoch's end stays an epoch's end
        (18, 8, 16, 96, 9),  # one and a half epochs
        (9, 16, 8, 96, 18),
        (13, 8, 16, 96, 6),  # 8 pictures into the epoch: half a batch is seen again rather than skipped
        (6, 16, 10, 100, 10),  # 6 batches of 16 are an epoch of 100
        (5, 16, 10, 100, 8),
        (2, 4, 64, 10, 1),  # a data set smaller than the new batch has one batch an epoch
        (3, 64, 4, 10, 6),
    ],
)
def test_another_batch_size_goes_on_at_the_same_share_of_the_epoch(
    batches_seen: int, old: int, new: int, num_samples: int, expected: int
) -> None:
    assert resumed_batch(batches_seen, old, new, num_samples) == expected


def test_resuming_never_leaves_the_epoch_and_never_skips_a_picture() -> None:
    for old, new, num_samples in itertools.product((1, 3, 8), (1, 2, 5, 16), (4, 17, 40)):
        old_per_epoch, new_per_epoch = max(1, num_samples // old), max(1, num_samples // new)
        for batches_seen in range(3 * old_per_epoch):
            resumed = resumed_batch(batches_seen, old, new, num_samples)
            epoch, position = divmod(batches_seen, old_per_epoch)
            assert epoch * new_per_epoch <= resumed <= (epoch + 1) * new_per_epoch
            if old != new:
                assert (resumed - epoch * new_per_epoch) * new <= position * old


# Seeds


def test_equal_positions_draw_equal_numbers() -> None:
    for _ in range(2):
        assert numpy_generator(Stream.ORDER, 3, 1, 2).random() == numpy_generator(Stream.ORDER, 3, 1, 2).random()
        first, second = (torch.rand(4, generator=torch_generator(Stream.TRAINING_NOISE, 3, 1, 2)) for _ in range(2))
        assert torch.equal(first, second)


def test_different_purposes_seeds_and_positions_draw_different_numbers() -> None:
    keys = [
        (stream, seed, epoch, index) for stream in Stream for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)
    ]
    assert len({numpy_generator(*key).random() for key in keys}) == len(keys)
    assert len({torch.rand((), generator=torch_generator(*key)).item() for key in keys}) == len(keys)
    # The position's length counts too: (epoch, index) is not (epoch,).
    assert numpy_generator(Stream.ORDER, 1, 5).random() != numpy_generator(Stream.ORDER, 1, 5, 1).random()


def test_seeding_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    torch.rand(3, generator=torch_generator(Stream.AUGMENTATION, 7))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_numbers_of_a_seed_are_fixed_for_good() -> None:
    # A checkpoint resumes exactly only while these stay: change them knowingly.
    assert numpy_generator(Stream.ORDER, 42, 0).permutation(8).tolist() == [6, 1, 0, 2, 4, 7, 3, 5]
    assert list(Stream) == [0, 1, 2, 3, 4, 5]


def test_more_processes_than_samples_are_refused() -> None:
    BatchStream(3, 8, 0, process_index=2, num_processes=3)
    with pytest.raises(
        InputError, match="4 processes for 3 training pairs: each needs one of its own; launch at most 3"
    ):
        BatchStream(3, 8, 0, process_index=0, num_processes=4)
