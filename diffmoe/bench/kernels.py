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

_FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "alias",
    "_local_scalar_dense",
    "is_same_size",
    "wait_tensor",
}
_FILLS = {
    "zeros",
    "zeros_like",
    "new_zeros",
    "ones",
    "ones_like",
    "new_ones",
    "full",
    "full_like",
    "new_full",
    "fill",
    "zero",
    "arange",
    "copy",
    "scalar_tensor",
    "random",
    "normal",
    "uniform",
}
_PICKS = {
    "index_select",
    "gather",
    "index",
    "embedding",
    "_embedding_bag",
    "_embedding_bag_forward_only",
}
_READS = {
    "read_by_host",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
_READING_METHODS = (
    "tolist",
    "cpu",
    "numpy",
)  # no operator shows them where the tensor is on the host already
# Names that say nothing of what a fused kernel does.
_SILENT = {
    "view",
    "reshape",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "convert_element_type",
    "split",
    "full",
    "iota",
    "clone",
    "slice",
    "select",
    "getitem",
    "unbind",
    "transpose",
    "t",
    "_unsafe_view",
}
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
    """Counts what passes while it is active.  ``owner`` says of the running operator (source of a
    kernel, place of a read).
    """

    def __init__(
        self, owner: Callable[[], tuple[str, str]] = lambda: ("model", "anywhere")
    ) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.fused: list[Kernel] = []  # of compiled code, as it would be with the ideal fusion
        self.reads: Counter[str] = Counter()  # by place
        self.collectives: Counter[str] = Counter()
        self.owner, self._inside_compiled, self._methods = owner, False, contextlib.ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile works on while this is active."""
        return True

    def __enter__(self) -> Counting:
        for name in _READING_METHODS:
            self._methods.enter_context(
                mock.patch.object(Tensor, name, self._reading(getattr(Tensor, name)))
            )
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._methods.close()

    def _reading(self, method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            # What collectives.read_by_host has is on the host: its operator counts, unless
            # recompute kept what it found.
            if (
                not torch.compiler.is_compiling()
                and sys._getframe(1).f_code.co_name != "read_by_host"
            ):
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
        """For ``torch.compile(backend=…)``: what is compiled counts, whenever it runs, as Inductor
        would fuse it on a GPU.
        """
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, inputs, inner_compile=self._lower)

    def _lower(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any
    ) -> Callable:
        run = copy.deepcopy(module)  # lowering changes it
        with _disable_current_modes(), as_on_a_gpu():
            kernels, fused = _scheduled(
                module,
                inputs,
                options.get("is_backward", False),
                options.get("is_inference", False),
            )

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

        call._boxed_call = True
        return call


def _name(func: Any) -> str:
    return func.name().partition("::")[2].split(".")[0]


def _is_read(name: str, args: Sequence[Any]) -> bool:
    """Whether the host waits for what the operator finds."""
    by_mask = name in ("index", "index_put_", "index_put") and any(
        t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    )
    return name in _READS or by_mask


def nbytes(tensors: Sequence[Any]) -> int:
    """Bytes of distinct tensors as they lie in memory, what is only repeated counted once."""
    total = 0
    for t in {id(t): t for t in tensors if isinstance(t, Tensor) and t.dim()}.values():
        elements = t.element_size()
        for size, stride in zip(t.shape, t.stride()):
            elements *= size if stride else 1
        total += elements
    return total


def kernels_of(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, source: str = "model"
) -> list[Kernel]:
    """The kernels of one operator, none for views."""
    name, packet = _name(func), func.overloadpacket
    given = list(zip((a.name for a in func._schema.arguments), args)) + list(kwargs.items())
    writes = {
        a.name
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name != "grads"
    }
    tensors = lambda values: [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    written = tensors([out, *(value for key, value in given if key in writes)])
    if func.is_view or name in _FREE or not written:
        return []
    read = tensors([value for key, value in given if key not in ("out", "grad_input")])
    if packet in flop_registry or name == "_grouped_mm":
        kind = "attention" if "attention" in name else "product"
        product = Kernel(
            kind, name, nbytes(read) + nbytes(written), _flops(packet, args, kwargs, out), source
        )
        added = args[0] if name in ("addmm", "baddbmm") else None
        if (
            added is None or added.dim() < written[0].dim()
        ):  # a row of biases is added by the product itself
            return [product]
        # cuBLAS adds what is in its output already: it is copied there.
        return [
            Kernel("memory", f"{name}'s sum", nbytes([added]) + nbytes(written), 0, source),
            product,
        ]
    return [
        Kernel(
            "memory", name, _moved(name.removesuffix("_"), read, written, dict(given)), 0, source
        )
    ]


def _moved(name: str, read: list[Tensor], written: list[Tensor], given: dict[str, Any]) -> int:
    indices = [t for t in read if t.dtype in (torch.int32, torch.int64)]
    if name in _FILLS:
        return nbytes(written) + nbytes(
            [given["src"]] if name == "copy" and isinstance(given.get("src"), Tensor) else []
        )
    if name == "_embedding_bag" or name == "_embedding_bag_forward_only":
        table, which = given["weight"], given["indices"]
        rows = (
            min(which.numel(), len(table)) * table.shape[1] * table.element_size()
        )  # a row that is wanted twice comes once
        return rows + nbytes(written[:1]) + nbytes(indices)
    if name in _PICKS:
        return 2 * nbytes(written) + nbytes(indices)
    if name in ("index_add", "scatter_add", "scatter", "index_put", "index_copy", "scatter_reduce"):
        target = given["self"]
        source = next(
            (
                given[key]
                for key in ("source", "src", "values")
                if isinstance(given.get(key), Tensor)
            ),
            None,
        )
        rows = (
            nbytes([source])
            if source is not None
            else sum(i.numel() for i in indices) * target.element_size()
        )
        adds = "add" in name or given.get("accumulate", False)
        copied = 0 if any(t is target for t in written) else 2 * nbytes([target])
        return copied + nbytes(indices) + rows * ((source is not None) + 1 + adds)
    return nbytes(read) + nbytes(written)


def _flops(packet: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    a, b = args[:2]  # _grouped_mm
    return 2 * (a.numel() * b.shape[-1] if a.dim() == 2 else a.shape[-2] * b.numel())


# ---------------------------------------------------------------------------------------------------
# Inductor


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What Inductor asks about device and Triton is answered for an H100, unless this machine can
    answer itself.
    """
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config

    with contextlib.ExitStack() as stack:
        # Its folding of constants computes them on the device; lowering writes them into the
        # kernels all the same.
        stack.enter_context(config.patch(joint_graph_constant_folding=False))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", lambda: True))
            # Attention that backward computes again counts as random, for which a generator of the
            # device would be asked.
            stack.enter_context(
                mock.patch(
                    "torch._functorch.partitioners.functionalize_rng_ops",
                    lambda _, forward, backward, *__: (forward, backward),
                )
            )
            for name, answer in (
                ("get_device_properties", _DEVICE),
                ("current_device", 0),
                ("device_count", 1),
                ("get_device_capability", (_DEVICE.major, _DEVICE.minor)),
            ):
                for owner in (torch.cuda, CudaInterface):
                    stack.enter_context(
                        mock.patch.object(
                            owner, name, staticmethod(lambda *_, answer=answer: answer), create=True
                        )
                    )
        yield


def _scheduled(
    module: torch.fx.GraphModule, inputs: Sequence[Any], backward: bool, inference: bool
) -> tuple[list[Kernel], list[Kernel]]:
    """A graph's kernels after Inductor's passes, lowering and fusion; and those of the ideal
    fusion.
    """
    import torch._inductor.compile_fx as inductor
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inductor.view_to_reshape(module)
    with torch.no_grad():
        mode = inductor.fake_tensor_prop(module, inputs)
    inductor._recursive_record_original_output_strides(module)
    with V.set_fake_mode(mode), inductor.DebugContext():
        inductor._recursive_post_grad_passes(module, is_inference=inference)
        graph = GraphLowering(
            module,
            example_inputs=inputs,
            shape_env=module.shape_env or inductor.shape_env_from_inputs(inputs),
            is_inference=inference,
            is_backward=backward,
        )
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            return _kernels_of_graph(graph.scheduler.nodes)


def _kernels_of_graph(nodes: Sequence[Any]) -> tuple[list[Kernel], list[Kernel]]:
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    kernels: list[Kernel] = []
    fused: list[Kernel] = []
    level: dict[str, int] = {}  # of every buffer: products on the longest way to it
    groups = _Groups()
    for node in nodes:
        reads, writes = node.read_writes.reads, set(node.get_buffer_names())
        above = max((level.get(dep.name, 0) for dep in reads), default=0)
        extern = isinstance(node, ExternKernelSchedulerNode)
        if (
            isinstance(node, NopKernelSchedulerNode)
            or extern
            and isinstance(node.node, MultiOutput)
        ):
            level.update(dict.fromkeys(writes, above))
            continue
        level.update(dict.fromkeys(writes, above + extern))
        if extern:
            found = _extern(node)
            fused += [k for k in found if not k.name.endswith("'s sum")]
        else:
            found = [Kernel("memory", _origins(node), node.get_read_write_buffers_sizes())]
            groups.add(node, above)
        kernels += found
    return kernels, fused + groups.kernels()


def _extern(node: Any) -> list[Kernel]:
    """A kernel that Inductor calls: by the rules of eager operators, for the graph's node that it
    came from.
    """
    called = getattr(node.node, "op_overload", None)
    origin = next(
        (o for o in node.node.get_origins() if o.target == called), node.node.get_origin_node()
    )
    if origin is None or not isinstance(origin.target, torch._ops.OpOverload):
        return [Kernel("memory", _origins(node), node.get_read_write_buffers_sizes())]
    args, kwargs = tree_map(
        lambda x: x.meta.get("val") if isinstance(x, torch.fx.Node) else x,
        (tuple(origin.args), dict(origin.kwargs)),
    )
    return kernels_of(origin.target, args, kwargs, origin.meta["val"])


def _origins(node: Any) -> str:
    names = (
        str(o.target).split(".")[1:2]
        for n in node.get_nodes()
        if n.node is not None
        for o in n.node.get_origins()
    )
    said = sorted({name[0] for name in names if name} - _SILENT)
    return " ".join(said) or "copy"


class _Groups:
    """The ideal fusion: kernels between the same products that hand data on to each other, or read
    the same, are one, which reads each of its inputs once and writes each of its outputs once.
    """

    def __init__(self) -> None:
        self.members: list[tuple[int, Any]] = []

    def add(self, node: Any, level: int) -> None:
        self.members.append((level, node))

    def kernels(self) -> list[Kernel]:
        parent = list(range(len(self.members)))

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        seen: dict[tuple[int, str], int] = {}  # (level, buffer) -> a member that touches it
        for i, (level, node) in enumerate(self.members):
            for name in {dep.name for dep in node.read_writes.reads_and_writes()}:
                parent[root(i)] = root(seen.setdefault((level, name), i))
        together: dict[int, list[Any]] = defaultdict(list)
        for i, (_, node) in enumerate(self.members):
            together[root(i)].append(node)
        return [Kernel("memory", "ideal", self._bytes(nodes)) for nodes in together.values()]

    @staticmethod
    def _bytes(nodes: list[Any]) -> int:
        read: dict[str, int] = defaultdict(int)
        written: dict[str, int] = defaultdict(int)
        for node in nodes:
            for total, reads in ((read, True), (written, False)):
                for name, size in node.get_read_write_buffer_accesses(
                    include_reads=reads, include_writes=not reads
                ).items():
                    total[name] = max(total[name], size)
        inside = {part for node in nodes for part in node.get_nodes()}
        kept = [
            name
            for name in written
            if any(
                user.node not in inside
                for node in nodes
                for user in node.scheduler.name_to_buf[name].users
            )
        ]
        return sum(size for name, size in read.items() if name not in written) + sum(
            written[name] for name in kept
        )
