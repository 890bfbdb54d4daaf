"""What a GPU would be asked to do: kernels with their bytes and FLOPs, reads by the host,
collectives.

Eager: every operator that reaches a device is a kernel, counted by :class:`Counting` as it passes.
Compiled: Inductor lowers and fuses as for a GPU, and its scheduler says what each kernel reads and
writes; no code is generated.  Bytes are the best that a kernel can do: each input read once, each
output written once; of rows that an index picks, these rows.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

# Operators that launch nothing, that only write, that touch the rows which an index picks, and that
# make the host wait.
_FREE = set(
    "empty empty_like new_empty empty_strided new_empty_strided detach lift_fresh _unsafe_view "
    "alias _local_scalar_dense is_same_size wait_tensor".split()
)
_FILLS = set(
    "zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full fill zero arange "
    "copy scalar_tensor random normal uniform".split()
)
_PICKS = {"index_select", "gather", "index", "embedding"}
_SCATTERS = set("index_add scatter_add scatter index_put index_copy scatter_reduce".split())
_READS = set(
    "read_by_host _local_scalar_dense nonzero masked_select _unique2 unique_dim "
    "unique_consecutive".split()
)
# No operator shows these where the tensor is on the host already.
_READING_METHODS = ("tolist", "cpu", "numpy")
# Names that say nothing of what a fused kernel does.
_SILENT = set(
    "view reshape permute expand unsqueeze squeeze convert_element_type split full iota clone "
    "slice select getitem unbind transpose t _unsafe_view".split()
)
# A GPU's figures for Inductor's choices, where none is at hand: an H100's.
_DEVICE = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)


@dataclass(frozen=True)
class Kernel:
    """One launch.  ``source``: whose it is, "model" or a part of the weights' traffic."""

    kind: Literal["product", "attention", "memory"]
    name: str
    bytes: int
    flops: int = 0
    source: str = "model"


class Counting(TorchDispatchMode):
    """Counts what passes; ``owner``: (source of a kernel, place of a read) of an operator."""

    supports_higher_order_operators = True  # compiled graphs have some

    def __init__(
        self, owner: Callable[[], tuple[str, str]] = lambda: ("model", "anywhere")
    ) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.fused: list[Kernel] = []  # of compiled graphs, with the ideal fusion
        self.reads: Counter[str] = Counter()  # by place
        self.collectives: Counter[str] = Counter()
        self.owner, self._inside_compiled, self._methods = owner, False, contextlib.ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile works on while this is active."""
        return True

    def __enter__(self) -> Counting:
        for name in _READING_METHODS:
            method = self._reading(getattr(Tensor, name))
            self._methods.enter_context(mock.patch.object(Tensor, name, method))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._methods.close()

    def _reading(self, method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            # What collectives.read_by_host has is on the host: its operator counts, unless
            # recompute kept what it found.
            caller = sys._getframe(1).f_code.co_name
            if not torch.compiler.is_compiling() and caller != "read_by_host":
                self.reads[self.owner()[1]] += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self._inside_compiled or torch.compiler.is_compiling():
            return out
        name = _name(func)
        if _is_read(name, args):
            self.reads[self.owner()[1]] += 1
        if func.namespace in ("_c10d_functional", "c10d"):
            if not name.startswith(("wait", "_wrap", "barrier")):
                self.collectives[name] += 1
        else:
            self.kernels += kernels_of(func, args, kwargs or {}, out, self.owner()[0])
        return out

    def backend(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        """For ``torch.compile``: compiled code counts as Inductor would fuse it on a GPU."""
        from torch._inductor.compile_fx import compile_fx

        # Its stubs know only Inductor's own inner compiler.
        return compile_fx(module, inputs, inner_compile=self._lower)  # type: ignore[arg-type, return-value]

    def _lower(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any
    ) -> Callable:
        run = copy.deepcopy(module)  # lowering changes it
        how = {name: options.get(name, False) for name in ("is_backward", "is_inference")}
        with _disable_current_modes(), as_on_a_gpu():
            kernels, fused = _scheduled(module, inputs, how)

        def call(inputs: list) -> Any:
            arguments = list(inputs)
            inputs.clear()
            self.kernels += kernels
            self.fused += fused
            self._inside_compiled = True
            try:
                return run(*arguments)
            finally:
                self._inside_compiled = False

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


def _name(func: Any) -> str:
    return func.name().partition("::")[2].split(".")[0]


def _is_read(name: str, args: Sequence[Any]) -> bool:
    """Whether the host waits for what the operator finds."""
    picks = args[1] if name in ("index", "index_put_", "index_put") else ()
    masks = [t for t in picks if t is not None and t.dtype in (torch.bool, torch.uint8)]
    return name in _READS or bool(masks)


def nbytes(tensors: Sequence[Any]) -> int:
    """Bytes of distinct tensors as they lie in memory, what is only repeated counted once."""
    distinct = {id(t): t for t in tensors if isinstance(t, Tensor) and t.dim()}.values()
    shapes = [[n if s else 1 for n, s in zip(t.shape, t.stride())] for t in distinct]
    return sum(math.prod(shape) * t.element_size() for t, shape in zip(distinct, shapes))


def kernels_of(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, source: str = "model"
) -> list[Kernel]:
    """The kernels of one operator, none for views."""
    name, packet, arguments = _name(func), func.overloadpacket, func._schema.arguments
    given = {**dict(zip((a.name for a in arguments), args)), **kwargs}
    writes = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    tensors = lambda values: [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    written = tensors([out, *(given.get(key) for key in writes if key != "grads")])
    if func.is_view or name in _FREE or not written:
        return []
    read = tensors([value for key, value in given.items() if key not in ("out", "grad_input")])
    if packet not in flop_registry and name != "_grouped_mm":
        size = _moved(name.removesuffix("_"), read, written, given)
        return [Kernel("memory", name, size, 0, source)]
    if packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
    else:
        a, b = args[:2]
        flops = 2 * (a.numel() * b.shape[-1] if a.dim() == 2 else a.shape[-2] * b.numel())
    size = nbytes(read) + nbytes(written)
    kind: Literal["product", "attention"] = "attention" if "attention" in name else "product"
    product = Kernel(kind, name, size, flops, source)
    # A row of biases is added by the product itself; for more cuBLAS adds to what is in its output
    # already: it is copied there.
    if name not in ("addmm", "baddbmm") or args[0].dim() < written[0].dim():
        return [product]
    copied = nbytes([args[0]]) + nbytes(written)
    return [Kernel("memory", f"{name}'s sum", copied, 0, source), product]


def _moved(name: str, read: list[Tensor], written: list[Tensor], given: dict[str, Any]) -> int:
    indices = [t for t in read if t.dtype in (torch.int32, torch.int64)]
    if name in _FILLS:
        return nbytes(written) + nbytes([given.get("src")] if name == "copy" else [])
    if name in ("_embedding_bag", "_embedding_bag_forward_only"):
        table, which = given["weight"], given["indices"]
        wanted = min(which.numel(), len(table))  # a row that is wanted twice comes once
        rows = wanted * table.shape[1] * table.element_size()
        return rows + nbytes(written[:1]) + nbytes(indices)
    if name in _PICKS:
        return 2 * nbytes(written) + nbytes(indices)
    if name in _SCATTERS:
        target, sources = given["self"], [given.get(key) for key in ("source", "src", "values")]
        source = next((each for each in sources if isinstance(each, Tensor)), None)
        rows = sum(i.numel() for i in indices) * target.element_size()
        if source is not None:
            rows = nbytes([source])
        adds = "add" in name or given.get("accumulate", False)
        copied = 0 if any(t is target for t in written) else 2 * nbytes([target])
        return copied + nbytes(indices) + rows * ((source is not None) + 1 + adds)
    return nbytes(read) + nbytes(written)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inductor hears of an H100, unless this machine can answer itself."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config

    answers = {
        "get_device_properties": _DEVICE,
        "current_device": 0,
        "device_count": 1,
        "get_device_capability": (_DEVICE.major, _DEVICE.minor),
    }
    with contextlib.ExitStack() as stack:
        # Its folding of constants computes them on the device; lowering writes them into the
        # kernels all the same.
        stack.enter_context(config.patch(joint_graph_constant_folding=False))
        # Attention that backward computes again counts as random, for which a generator of the
        # device would be asked, and the operator be hidden inside another.
        functionalize = "torch._functorch.partitioners.functionalize_rng_ops"
        as_it_is = lambda _, forward, backward, *__: (forward, backward)
        stack.enter_context(mock.patch(functionalize, as_it_is))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", lambda: True))
            for name, answer in answers.items():
                says = staticmethod(lambda *_, answer=answer: answer)
                for owner in (torch.cuda, CudaInterface):
                    stack.enter_context(mock.patch.object(owner, name, says, create=True))
        yield


def _scheduled(
    module: torch.fx.GraphModule, inputs: Sequence[Any], how: dict[str, Any]
) -> tuple[list[Kernel], list[Kernel]]:
    """A graph's kernels after Inductor's passes, lowering and fusion; and with the ideal fusion."""
    import torch._inductor.compile_fx as inductor
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inductor.view_to_reshape(module)
    with torch.no_grad():
        mode = inductor.fake_tensor_prop(module, inputs)
    inductor._recursive_record_original_output_strides(module)
    with V.set_fake_mode(mode), inductor.DebugContext():
        inductor._recursive_post_grad_passes(module, is_inference=how["is_inference"])
        shapes = module.shape_env or inductor.shape_env_from_inputs(inputs)
        graph = GraphLowering(module, example_inputs=inputs, shape_env=shapes, **how)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            return _of_graph(graph.scheduler.nodes)


def _of_graph(nodes: Sequence[Any]) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of scheduled nodes; and those of the ideal fusion, where all that lie between the
    same products or library calls, and touch the same buffers, are one.
    """
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    kernels, fused = [], []
    level: dict[str, int] = {}  # of a buffer: products on the longest way to it
    # By level: disjoint sets of buffers, each with the nodes that touch them.
    groups: dict[int, list[tuple[set[str], list[Any]]]] = defaultdict(list)
    for node in nodes:
        found, called = _of_node(node), isinstance(node, ExternKernelSchedulerNode)
        above = max((level.get(dep.name, 0) for dep in node.read_writes.reads), default=0)
        level.update(dict.fromkeys(node.get_buffer_names(), above + bool(found and called)))
        kernels += found
        if called:  # what a product adds, it could have added itself
            fused += [k for k in found if not k.name.endswith("'s sum")]
        elif found:
            buffers, together = {dep.name for dep in node.read_writes.reads_and_writes()}, [node]
            apart = []
            for group in groups[above]:
                if buffers.isdisjoint(group[0]):
                    apart.append(group)
                else:
                    buffers, together = buffers | group[0], together + group[1]
            groups[above] = [*apart, (buffers, together)]
    each = [together for level_groups in groups.values() for _, together in level_groups]
    return kernels, fused + [Kernel("memory", "ideal", _bytes_as_one(nodes)) for nodes in each]


def _bytes_as_one(nodes: list[Any]) -> int:
    """Of nodes in one kernel: each input read once, each output written once."""
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for node in nodes:
        read |= Counter(node.get_read_write_buffer_accesses(True, False))
        written |= Counter(node.get_read_write_buffer_accesses(False, True))
    inside = {part for node in nodes for part in node.get_nodes()}
    users = {name: nodes[0].scheduler.name_to_buf[name].users for name in written}
    outputs = [name for name in written if any(user.node not in inside for user in users[name])]
    inputs = [name for name in read if name not in written]
    return sum(read[name] for name in inputs) + sum(written[name] for name in outputs)


def _of_node(node: Any) -> list[Kernel]:
    """Kernels of a scheduled node; a library call counts as the operator that it came from."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    extern = isinstance(node, ExternKernelSchedulerNode)
    if isinstance(node, NopKernelSchedulerNode) or extern and isinstance(node.node, MultiOutput):
        return []
    if extern:
        called, origin = getattr(node.node, "op_overload", None), node.node.get_origin_node()
        origin = next((o for o in node.node.get_origins() if o.target == called), origin)
        if origin is not None and isinstance(origin.target, torch._ops.OpOverload):
            value = lambda x: x.meta.get("val") if isinstance(x, torch.fx.Node) else x
            args, kwargs = tree_map(value, (tuple(origin.args), dict(origin.kwargs)))
            out = origin.meta["val"] if origin.target._schema.returns else None
            return kernels_of(origin.target, args, kwargs, out)
    return [Kernel("memory", _origins(node), node.get_read_write_buffers_sizes())]


def _origins(node: Any) -> str:
    nodes = [n.node for n in node.get_nodes() if n.node is not None]
    names = [str(o.target).split(".")[1:2] for n in nodes for o in n.get_origins()]
    return " ".join(sorted({name[0] for name in names if name} - _SILENT)) or "copy"
