"""Real loader workers under a real mpirun: they read ahead, and leave MPI alone."""

from __future__ import annotations

import json
import re

import psutil
import pytest

JOB = """
    import json, os, sys
    import numpy, torch
    from torch.utils.data import Dataset
    import mpiddl
    from mpiddl.data.loading.loaders import loader
    from mpiddl.data.reading.npy import read_npy
    from mpiddl.data.reading.text import TextLines
    from mpiddl.data.loading.streams import ShardedStream

    LENGTH = 41

    class Images(Dataset):
        def __init__(self, images, lines):
            self.images, self.lines = images, lines
        def __len__(self):
            return len(self.images)
        def __getitem__(self, index):
            assert isinstance(self.images, numpy.memmap)
            assert self.lines[index] == f"line {index}"
            assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == (os.environ["SEEN"], "2")
            return torch.tensor([int(self.images[index, 0]), os.getpid(), "mpi4py" in sys.modules])

    def numbers():  # the stream divides: its source must not
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
        for number in range(LENGTH):
            assert "mpi4py" not in sys.modules
            yield number

    def values(batches):
        return [value for batch in batches for value in batch]

    if __name__ == "__main__":
        world = mpiddl.init()
        os.environ["SEEN"] = str(world.rank)
        folder = sys.argv[1]
        if world.rank == 0:
            rows = numpy.repeat(numpy.arange(LENGTH, dtype=numpy.int64)[:, None], 5000, axis=1)
            numpy.save(f"{folder}/a.npy", rows)
            with open(f"{folder}/lines", "w") as stream:
                stream.writelines(f"line {i}\\n" for i in range(LENGTH))
        mpiddl.barrier()

        dataset = Images(read_npy(f"{folder}/a.npy"), TextLines(f"{folder}/lines"))
        batches = mpiddl.ShardBatchSampler(dataset, world, batch_size=8)
        images = loader(dataset, batches=batches, num_workers=2)
        epochs = []
        for epoch in range(2):
            batches.set_epoch(epoch)
            epochs.append([row.tolist() for batch in images for row in batch])
        del images

        stream = ShardedStream(numbers, world, shuffle_buffer=4)
        items = loader(stream, batch_size=3, num_workers=2)
        streams = []
        for epoch in range(2):
            stream.set_epoch(epoch)
            streams.append([batch.tolist() for batch in items])
        state = stream.state_dict(3, items)
        stream.load_state_dict(state)
        rest = [batch.tolist() for batch in items]
        if world.rank == 1:
            stream.set_epoch(2)
            next(iter(items))  # ends with workers that read ahead
        found = mpiddl.gather_json([world.rank, os.getpid(), epochs, streams, rest])
        if world.rank == 0:
            print(json.dumps(found))
"""


def test_workers_read_everything_once_and_leave_mpi_alone(start, tmp_path):
    job = start(2, JOB, str(tmp_path))

    assert job.status == 0, job.both
    assert job.err == ""
    ranks = json.loads(job.out)
    for epoch in range(2):
        rows = [row for _, _, epochs, _, _ in ranks for row in epochs[epoch]]
        assert sorted(number for number, _, _ in rows) == list(range(41))
        assert not any(mpi for _, _, mpi in rows)
        streamed = [n for *_, streams, _ in ranks for batch in streams[epoch] for n in batch]
        assert sorted(streamed) == list(range(41))
    for rank, pid, epochs, streams, rest in ranks:
        workers = [{worker for _, worker, _ in rows} for rows in epochs]
        assert len(workers[0]) == 2
        assert pid not in workers[0]
        assert workers[0] == workers[1]  # they live on
        assert epochs[0] != epochs[1]
        assert streams[0] != streams[1]
        assert all(number % 2 == rank for batch in streams[0] for number in batch)
        assert rest == streams[1][3:]


FAILING_JOB = """
    import os, signal, sys
    import torch
    from torch.utils.data import TensorDataset
    import mpiddl
    from mpiddl.data.loading.loaders import loader

    def say(worker):
        print("worker", os.getpid(), torch.utils.data.get_worker_info().id == worker, flush=True)

    if __name__ == "__main__":
        world = mpiddl.init()
        dataset = TensorDataset(torch.arange(100))
        batches = mpiddl.ShardBatchSampler(dataset, world, batch_size=4)
        images = loader(dataset, batches=batches, num_workers=1, worker_init_fn=say)
        batch = iter(images)
        next(batch)
        mpiddl.barrier()
        if world.rank == 1:
            {action}
        mpiddl.barrier()
"""


@pytest.mark.by_day(1)
@pytest.mark.parametrize("action", ["os.kill(os.getpid(), signal.SIGKILL)", "raise KeyError"])
def test_workers_end_with_their_rank(start, action):
    job = start(2, FAILING_JOB.format(action=action))  # would wait for workers that live on

    assert job.status != 0
    workers = [int(pid) for pid in re.findall(r"worker (\d+) True", job.out)]
    assert len(workers) == 2
    alive = [psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)]
    assert psutil.wait_procs(alive, timeout=120)[1] == []
