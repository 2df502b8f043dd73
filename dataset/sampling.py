"""Which samples a process sees, and when: a pure function of (seed, batch number, processes)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from utils.errors import InputError
from utils.seeding import Stream, numpy_generator


class BatchStream(Sampler[list[tuple[int, int]]]):
    """The endless sequence of global batches, cut to one process's share; starts anywhere without loading what lies before.

    An epoch's order depends on (seed, epoch) alone. The pictures left over after its last whole global batch wait for a
    later epoch; a data set smaller than one global batch is repeated to fill it.

    Args:
        num_samples: of the data set.
        batch_size: per process.
        seed: of the order.
        process_index: of this process.
        num_processes: in total.
        start: first batch.
        stop: batch before which the stream ends.

    Raises:
        InputError: if there are more processes than samples.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        start: int = 0,
        stop: int = 0,
    ) -> None:
        if num_processes > num_samples:
            raise InputError(
                f"{num_processes} processes for {num_samples} training pairs: each needs one of its own; launch at most "
                f"{num_samples}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.global_batch_size = batch_size * num_processes
        self.batches_per_epoch = max(1, num_samples // self.global_batch_size)
        self.seed = seed
        self.process_index = process_index
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        """Returns the number of batches from start to stop."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yields this process's batches as lists of (epoch, index)."""
        order, order_epoch = np.empty(0, np.int64), -1
        for batch in range(self.start, self.stop):
            epoch, position = divmod(batch, self.batches_per_epoch)
            if epoch != order_epoch:
                order = numpy_generator(Stream.ORDER, self.seed, epoch).permutation(self.num_samples)
                order_epoch = epoch
            first = position * self.global_batch_size + self.process_index * self.batch_size
            yield [(epoch, int(order[(first + i) % self.num_samples])) for i in range(self.batch_size)]


def resumed_batch(batches_seen: int, old_global_batch_size: int, new_global_batch_size: int, num_samples: int) -> int:
    """Returns where to go on in a stream of another global batch size: the same epoch, the same share of its pictures."""
    if old_global_batch_size == new_global_batch_size:
        return batches_seen
    epoch, position = divmod(batches_seen, max(1, num_samples // old_global_batch_size))
    per_epoch = max(1, num_samples // new_global_batch_size)
    return epoch * per_epoch + min(per_epoch, position * old_global_batch_size // new_global_batch_size)
