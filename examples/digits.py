"""Train, calibrate, measure and use a multi-exit network of handwritten digits, from Python: under a minute, no download.

python examples/digits.py [FOLDER]
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import eectl


def main(folder: Path) -> None:
    """Do it all in `folder`."""
    run = eectl.train("digits", regime="joint", epochs=5, changes=["exits.after=[1, 4]"], out=folder / "run", overwrite=True)
    policy = folder / "policy.json"
    eectl.calibrate(run.path, budgets=[50, 100], out=policy, overwrite=True)

    measured = eectl.evaluate(run.path, policy=policy)
    for entry in measured.budgets:
        budget = "unlimited" if entry.budget is None else f"{entry.budget:g} %"
        print(f"budget {budget}: accuracy {entry.value:.1%} on the test split")

    model = eectl.load(run.path, policy=policy, budget=50)
    images = np.rint(load_digits().images[:10] * (255 / 16)).astype(np.uint8)  # any 8-bit images: paths, PIL, arrays, tensors
    answers = model.predict(list(images), top=2)
    for answer in answers:
        print(
            f"{answer.label} ({answer.probability:.0%}), left at exit {answer.exit} of {len(model.exits)}, cost {answer.cost:.0%}"
        )
    print(f"mean cost {np.mean(answers.costs):.0%} of the plain network's")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits-example"))
