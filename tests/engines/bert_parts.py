"""An algorithm and a workplace with a real model, for worker processes to import."""

from dataclasses import dataclass

from fedpilot.client import ClientModel
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, Site, Task, Upload
from tests import tiny


@dataclass(frozen=True)
class Fitting:
    """Trains what the plan says."""

    def local_update(self, task: Task, site: Site) -> Upload:
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        tensors = {name: tensor for name, tensor in site.model.read().items() if name in task.plan.trainable}
        return Upload(site.profile.client_id, site.profile.num_examples, tensors, metrics)


class Berts:
    """A workplace with the tiny BERT of the folder, one model for all clients."""

    def __init__(self, folder: str) -> None:
        settings = tiny.settings("bert", source=folder)
        self.adapted = tiny.build_model(settings, num_labels=tiny.NUM_LABELS)

    def site(self, client_id: int, round: int) -> Site:
        settings = TrainingSettings(learning_rate=0.02, batch_size=4)
        data = tiny.examples("bert", 8 + client_id, seed=client_id)
        model = ClientModel(self.adapted, data, settings, learning_rate=0.02, seed=100 * client_id + round)
        return Site(ClientProfile(client_id, len(data), 0), model)


@dataclass(frozen=True)
class MakeBerts:
    """Makes `Berts` in a worker process."""

    folder: str

    def __call__(self) -> Berts:
        return Berts(self.folder)
