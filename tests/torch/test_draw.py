"""What TensorBoard is given to draw of a network, and that drawing leaves it and the generators as they were."""

from __future__ import annotations

import pytest
import torch

from spark_nn.torch.draw import draw

pytestmark = pytest.mark.timeout(120)


class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.wide = torch.nn.Linear(2, 3), torch.nn.Linear(5, 3)
        self.norm, self.drop = torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)
        self.norm.eval()  # as one that is frozen

    def forward(self, wide, narrow):
        joined = self.drop(self.norm(self.wide(wide) + self.narrow(narrow)))
        return {"sum": joined.sum(dim=1), "relu": joined.relu()}


def test_inputs_go_by_name_and_nothing_else_changes():
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    module = Both()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes, state = [each.training for each in module.modules()], torch.get_rng_state()
    graph, layers = draw(module, {"narrow": torch.ones(1, 2), "wide": torch.ones(1, 5)})
    assert {"aten::linear", "aten::batch_norm", "aten::relu"} <= {node.op for node in GraphDef.FromString(graph).node}
    assert layers is None
    assert [each.training for each in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
