"""Find the length of rows for a divided run in a process of its own: `python -m cora_cli.training.fit_alone DIRECTORY`.

`fitting` starts it and writes the directory's `RUN`; the answer is `ROWS`.
"""

import pickle
import sys
from pathlib import Path

from cora_cli.training.fitting import ROWS, RUN, shorter_rows
from cora_cli.training.prepare import prepare


def main(place: Path) -> None:
    """Read the run in `place`, and write the answer there."""
    config, hardware, capacity = pickle.loads((place / RUN).read_bytes())
    prepared = prepare(config, config.template_date, planned=hardware)
    (place / ROWS).write_bytes(pickle.dumps(shorter_rows(config, prepared, capacity)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
