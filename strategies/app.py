"""The Flower ServerApp: compose the experiment once, then run its rounds on whatever Grid Flower gives.

``flwr run . --run-config 'overrides="experiment=airlines rounds=3"'`` uses the same overrides as ``fedpeft simulate``.
"""

import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federated.cli.compose import compose
from federated.flower import Run, use_app_folder
from federated.logs import set_up_logs

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Compose and serve."""
    folder = Path(__file__).resolve().parent.parent
    use_app_folder(folder)
    config = compose(folder, shlex.split(str(context.run_config.get("overrides", ""))))
    set_up_logs("serverapp", config.tracking.log_format, whole=False)
    Run(config).serve(grid)
