"""Find which setting of a divided run fits, in a process of its own: `python -m cora_cli.training.fit_alone DIRECTORY`.

`fitting` starts it and writes the directory's `RUN`; the answer is `ANSWER`.
"""

import pickle
import sys
from pathlib import Path

from cora_cli.training.fitting import ANSWER, RUN, shorter_rows, what_would_fit
from cora_cli.training.prepare import prepare


def main(place: Path) -> None:
    """Read the run in `place`, and write the answer there."""
    question, config, hardware, capacity = pickle.loads((place / RUN).read_bytes())
    prepared = prepare(config, config.template_date, planned=hardware)
    answer = (shorter_rows if question == "rows" else what_would_fit)(config, prepared, capacity)
    (place / ANSWER).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
