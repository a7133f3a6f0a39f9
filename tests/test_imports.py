"""Imports point one way: between the packages, between the rooms of `reallm`, and without circles anywhere."""

from __future__ import annotations

import networkx as nx
import pytest
from import_graph import INNER, ROOT, imported_names, module_graph, room, source_files

PACKAGES = {
    "kernels": {"kernels"},
    "planner": {"kernels", "planner"},
    "codegen": {"kernels", "planner", "codegen"},
}
"""Package -> packages that it may import: kernels <- planner <- codegen <- reallm."""
ROOMS = (
    *("errors", "system", "models", "text", "decoding", "codecs", "artifacts", "runtime"),
    *(
        "calibration",
        "measurement",
        "compilation",
        "evaluation",
        "targets",
        "planning",
        "compressing",
        "finetuning",
        "reporting",
        "cli",
    ),
)
"""The rooms of `reallm` in order: a room imports only itself and rooms that stand before it."""
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the repository, not the wheel")


def test_packages_import_one_way() -> None:
    wrong = []
    for module, file in source_files():
        package = module.split(".")[1] if module.count(".") else ""
        targets = {name.split(".")[1] for name in imported_names(file, module) if name.startswith("reallm.")}
        wrong += [f"{module} imports reallm.{target}" for target in targets - PACKAGES.get(package, targets)]
    assert not wrong


def test_rooms_import_only_earlier_rooms() -> None:
    place = {name: number for number, name in enumerate(ROOMS)}
    edges = [(source, target) for source, target in module_graph().edges if {room(source), room(target)} <= {*place}]
    assert len(edges) > 200
    wrong = [f"{source} imports {target}" for source, target in edges if place[room(source)] < place[room(target)]]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_place() -> None:
    rooms = {room(module) for module, _ in source_files()}
    assert {name for name in rooms if name and name.split(".")[0] not in INNER} - {"__main__"} == {*ROOMS}


def test_there_are_no_circles() -> None:
    graph = module_graph()
    graph.remove_node("reallm")  # its public names are imported when they are first used
    circles = [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert not circles


def test_rooms_have_no_circles() -> None:
    rooms = nx.DiGraph((room(source), room(target)) for source, target in module_graph().edges)
    rooms.remove_edges_from(list(nx.selfloop_edges(rooms)))
    rooms.remove_node("")
    circles = [sorted(circle) for circle in nx.strongly_connected_components(rooms) if len(circle) > 1]
    assert not circles
