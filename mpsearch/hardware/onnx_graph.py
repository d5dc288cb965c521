"""An ONNX graph whose weights are found and whose nodes are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError

Kind = Literal["linear", "embedding", "other"]


class Read(NamedTuple):
    """A node that reads a weight.

    Attributes:
        node: the node.
        kind: ``linear`` for MatMul and Gemm, ``embedding`` for Gather, ``other`` for what is neither.
        turned: whether it reads the weight with its two axes exchanged.
    """

    node: Any
    kind: Kind
    turned: bool


class Graph:
    """The graph of a model, with its weights loaded only where they are asked for.

    Attributes:
        proto: the ModelProto; changed by `replace` and `finish`.
    """

    def __init__(self, source: Any) -> None:
        """Take a ModelProto, which is copied, or the path of a file.

        Raises:
            InputError: a file that is missing (E101) or not ONNX (E404).
        """
        import onnx

        if isinstance(source, (str, Path)):
            self._folder = str(Path(source).parent)
            self.proto = _load(Path(source))
        else:
            self._folder = ""
            self.proto = onnx.ModelProto()
            self.proto.CopyFrom(source)
        self._tensors = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self._readers: dict[str, list[Any]] = {}
        for node in self.proto.graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._replaced: dict[str, Sequence[Any]] = {}

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says it is."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    def reads(self, names: Iterable[str], weight: NDArray[np.float32]) -> list[Read]:
        """All nodes that read a weight: by the names it may have, or by its numbers where it has none of them.

        Args:
            names: names of tensors.
            weight: its values as the model stores them.
        """
        found = [read for name in names if name in self._tensors for read in self._from(name, name, turned=False)]
        return found or list(self._alike(weight))

    def _from(self, origin: str, name: str, turned: bool) -> Iterator[Read]:
        for node in self._readers.get(name, ()):
            if node.op_type == "Identity" or (node.op_type == "Transpose" and _swaps(node)):
                yield from self._from(origin, node.output[0], turned != (node.op_type == "Transpose"))
            elif node.op_type == "Gather" and node.input[0] == name and not turned and not _attribute(node, "axis", 0):
                yield Read(node, "embedding", turned)
            elif node.op_type == "MatMul" and node.input[1] == name != node.input[0]:
                yield Read(node, "linear", turned)
            elif node.op_type == "Gemm" and node.input[1] == name and _is_product(node):
                yield Read(node, "linear", turned != bool(_attribute(node, "transB", 0)))
            else:
                yield Read(node, "other", turned)

    def _alike(self, weight: NDArray[np.float32]) -> Iterator[Read]:
        """Reads of tensors that hold the numbers of a weight, or these with the axes exchanged."""
        for name, tensor in self._tensors.items():
            shape = tuple(tensor.dims)
            for turned in (False, True):
                wanted = weight.T if turned else weight
                if shape == wanted.shape and len(shape) == 2 and np.array_equal(self.value(name), wanted):
                    for read in self._from(name, name, turned=False):
                        yield read._replace(turned=read.turned != turned)
                    break

    def value(self, name: str) -> NDArray[Any]:
        """The numbers of a tensor."""
        from onnx import numpy_helper

        found: NDArray[Any] = numpy_helper.to_array(self._tensors[name], self._folder)
        return found

    def replace(self, node: Any, nodes: Sequence[Any]) -> None:
        """Put nodes, the last of which gives the same output, in the place of one."""
        self._replaced[node.output[0]] = nodes

    def finish(self, tensors: Mapping[str, NDArray[Any]]) -> Any:
        """Do what was asked for, drop what nothing reads any more, and load the weights that are left.

        Args:
            tensors: what the new nodes read; one of a name that is there takes its place.

        Returns:
            The ModelProto.
        """
        from onnx import external_data_helper, helper, numpy_helper

        graph = self.proto.graph
        nodes = [new for node in graph.node for new in self._replaced.get(node.output[0], (node,))]
        kept, needed = _needed(nodes, [output.name for output in graph.output])
        old = [tensor for tensor in graph.initializer if tensor.name in needed and tensor.name not in tensors]
        for tensor in old:
            if external_data_helper.uses_external_data(tensor):
                external_data_helper.load_external_data_for_tensor(tensor, self._folder)
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
        new = [numpy_helper.from_array(array, name) for name, array in tensors.items() if name in needed]
        for field, content in (("node", kept), ("initializer", [*old, *new]), ("value_info", [])):
            graph.ClearField(field)
            getattr(graph, field).extend(content)
        if not any(opset.domain == "com.microsoft" for opset in self.proto.opset_import):
            self.proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return self.proto


def _load(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError("E101", f"'{path}' cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise InputError("E404", f"'{path}' is not an ONNX file, or cut", advice="export the model again") from error


def _needed(nodes: Sequence[Any], outputs: Iterable[str]) -> tuple[list[Any], set[str]]:
    """Nodes that the outputs hang on, in their order, and all names that are read."""
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1], needed


def _attribute(node: Any, name: str, default: float) -> float:
    from onnx import helper

    found = [helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name]
    return float(found[0]) if found else default


def _swaps(node: Any) -> bool:
    """Whether a Transpose exchanges two axes, and there are no others."""
    order = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
    return order == [[1, 0]]


def _is_product(node: Any) -> bool:
    """Whether a Gemm is ``x @ w`` or ``x @ w + c``, with nothing scaled."""
    plain = _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
    return plain and not _attribute(node, "transA", 0)
