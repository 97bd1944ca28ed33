"""Module trees contain only neighbors, every node once, and never too many children."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from pnn_compile.export.module_trees import ModuleGroup, ModuleTree, module_trees

PATHS = st.lists(
    st.lists(st.sampled_from(["a", "b", "0"]), max_size=4).map(".".join), max_size=60
)  # fmt: skip


def leaves(trees: tuple[ModuleTree, ...]) -> Iterator[int]:
    for tree in trees:
        if isinstance(tree, ModuleGroup):
            yield from leaves(tree.children)
        else:
            yield tree


def groups(trees: tuple[ModuleTree, ...]) -> Iterator[ModuleGroup]:
    for tree in trees:
        if isinstance(tree, ModuleGroup):
            yield tree
            yield from groups(tree.children)


@given(PATHS, st.integers(2, 7))
def test_every_node_stands_once_and_in_order(paths: list[str], most: int) -> None:
    trees = module_trees(paths, limit=most)
    assert list(leaves(trees)) == list(range(len(paths)))
    assert len(trees) <= most
    for group in groups(trees):
        assert 1 <= len(group.children) <= most
        for index in leaves(group.children):
            inside = group.path == "" or (paths[index] + ".").startswith(group.path + ".")
            assert inside


def test_a_module_is_a_group_with_the_rest_of_its_path() -> None:
    trees = module_trees(["stem", "body.0.conv", "body.0.norm", "body.1.conv", "body.1.norm", ""])
    assert trees[0] == 0
    assert trees[2] == 5
    body = trees[1]
    assert isinstance(body, ModuleGroup)
    assert [getattr(child, "label", None) for child in body.children] == ["0", "1"]
    assert [getattr(child, "path", None) for child in body.children] == ["body.0", "body.1"]


def test_levels_with_one_child_are_one() -> None:
    (group,) = module_trees(["model.encoder.layers.0.a", "model.encoder.layers.0.b"])
    assert isinstance(group, ModuleGroup)
    assert (group.label, group.children) == ("model.encoder.layers.0", (0, 1))


def test_long_runs_are_gathered() -> None:
    (layers,) = module_trees([f"layers.{n}.{part}" for n in range(100) for part in "xy"])
    assert isinstance(layers, ModuleGroup)
    assert [len(child.children) for child in layers.children if isinstance(child, ModuleGroup)] == [
        25
    ] * 4


def test_deep_paths_do_not_exhaust_the_stack() -> None:
    deep = [".".join("a" * length) for length in range(1, 600)]
    assert list(leaves(module_trees(deep))) == list(range(599))
