"""Train, calibrate, measure, explain and deploy multi-exit neural networks.

Every command of the program is a function here, with the command's names and defaults, and `load` gives a network to use:

    import eectl

    run = eectl.train("digits", epochs=2, out="runs/digits")
    eectl.calibrate(run.path, budgets="25,50,75,100", out="policy.json")
    model = eectl.load(run.path, policy="policy.json", budget=50)
    model.predict(["one.png", "two.png"]).labels

What is named here is imported when it is first used: importing eectl alone imports no torch.

>>> import eectl
>>> recipe = eectl.Recipe(epochs=2, data={"name": "digits"})
>>> recipe.regime, recipe.data.name
('mixed', 'digits')
"""

TYPE_CHECKING = False  # type checkers take it for True; typing itself would be half of the time that importing eectl takes

if TYPE_CHECKING:
    from eectl.analyses.analyze import analyze
    from eectl.core.errors import EectlError
    from eectl.deploy.model import Model, load
    from eectl.deploy.predict import predict
    from eectl.evaluation.bench import bench
    from eectl.evaluation.calibrate import calibrate
    from eectl.evaluation.evaluate import evaluate
    from eectl.recipe.recipe import Recipe
    from eectl.reports.report import report
    from eectl.training.attach import attach_heads
    from eectl.training.dry_run import flops
    from eectl.training.find_lr import find_lr
    from eectl.training.train import train

__version__ = "0.1.0"
__all__ = [
    "EectlError",
    "Model",
    "Recipe",
    "__version__",
    "analyze",
    "attach_heads",
    "bench",
    "calibrate",
    "evaluate",
    "find_lr",
    "flops",
    "load",
    "predict",
    "report",
    "train",
]
_HOMES = {
    "EectlError": "eectl.core.errors",
    "Model": "eectl.deploy.model",
    "Recipe": "eectl.recipe.recipe",
    "analyze": "eectl.analyses.analyze",
    "attach_heads": "eectl.training.attach",
    "bench": "eectl.evaluation.bench",
    "calibrate": "eectl.evaluation.calibrate",
    "evaluate": "eectl.evaluation.evaluate",
    "find_lr": "eectl.training.find_lr",
    "flops": "eectl.training.dry_run",
    "load": "eectl.deploy.model",
    "predict": "eectl.deploy.predict",
    "report": "eectl.reports.report",
    "train": "eectl.training.train",
}


if not TYPE_CHECKING:  # which need it not, and would take any name for one of the package's

    def __getattr__(name):
        """Import what is called `name` from its home, the first time that it is asked for."""
        if name not in _HOMES:
            raise AttributeError(f"module 'eectl' has no attribute '{name}'")
        from importlib import import_module

        found = getattr(import_module(_HOMES[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
