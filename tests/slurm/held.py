"""jobs/digits.py, which stays at the end of the first epoch of a start until SIGUSR1 has come.

So signals meet it in training, whatever the machine does meanwhile. A start after that many
restarts of its job runs to its end:

    python held.py 2 --epochs 3 --out FOLDER
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs"))

import digits

from mpiddl import job
from mpiddl.job.preemption import is_any_rank_asked


class HeldRun(job.Run):
    """A run whose first ``epoch_ends`` returns late."""

    held = int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= int(sys.argv.pop(1))

    def epoch_ends(self, **values):
        row = super().epoch_ends(**values)
        while not self.held:
            time.sleep(0.01)
            self.held = is_any_rank_asked(self._world)
        return row


if __name__ == "__main__":
    job.Run = HeldRun
    job.start(digits.main, digits.Flags)
