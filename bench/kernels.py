"""How many kernels a compiled step launches on a GPU, and how many bytes they move, counted without a
GPU.

    python bench/kernels.py [-p batch_size 16] [--inductor '{"realize_reads_threshold": 8}']

PyTorch's compiler is taken up to its scheduler for a pretended device: the graphs of model and loss,
forward and backward, are traced on the CPU and moved to it. One JSON line a direction: ``pointwise`` and
``reductions`` are the kernels it writes itself, ``calls`` those of libraries (convolutions, matrix
products), ``MB`` what its own kernels read and write in all. Guard, optimizer and augmentation are left
out. Counts say nothing of registers and caches: bench/speed.py decides what pays.

It reaches into the compiler (written for torch 2.13; its decisions differ a little between releases).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, config, scheduler
from torch._inductor.codegen.common import init_backend_registration
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import post_grad
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from refinelib.build import autocast, build_loss, build_model
from refinelib.config import resolve
from refinelib.modeling import layers as blocks
from refinelib.step import compiler_options

#: What the compiler asks of a device, as an H100 answers.
DEVICE = SimpleNamespace(
    name="NVIDIA H100",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    L2_cache_size=50 << 20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)


@contextlib.contextmanager
def pretended():
    """PyTorch believes that there is such a device."""
    answers = dict(
        is_available=True,
        device_count=1,
        current_device=0,
        get_device_properties=DEVICE,
        get_device_capability=(9, 0),
        is_bf16_supported=True,
    )

    def layout(x, weight, backend):  # of a convolution's result there
        last = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return torch.channels_last if last else torch.contiguous_format

    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        interface = "torch._dynamo.device_interface.CudaInterface"
        for place in (interface, f"{interface}.Worker"):
            stack.enter_context(
                mock.patch(f"{place}.get_device_properties", staticmethod(lambda *_, **__: DEVICE))
            )
        stack.enter_context(mock.patch.object(scheduler, "has_triton", lambda *_: True))
        stack.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", layout))
        # This pass copies tensors as it goes, for which the device itself would be needed.
        stack.enter_context(mock.patch.object(post_grad, "reinplace_inplaceable_ops", lambda *_: None))
        yield


def counted(direction: str, options: dict, found: list[dict]):
    """A compiler that counts, and leaves the graph as it is."""

    def compiler(graph, inputs):
        there, mode = copy.deepcopy(graph), detect_fake_mode(inputs)
        for node in there.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        there.recompile()
        with pretended(), config.patch(options), V.set_fake_mode(mode):
            with mode:
                inputs = [
                    torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")
                    if isinstance(x, torch.Tensor)
                    else x
                    for x in inputs
                ]
            compile_fx.view_to_reshape(there)
            compile_fx.fake_tensor_prop(there, inputs)
            compile_fx._recursive_post_grad_passes(there, is_inference=False)
            lowered = GraphLowering(there, example_inputs=inputs, is_backward=direction == "backward")
            with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
                lowered.run(*inputs)
                found.append(
                    {"direction": direction, **_count(scheduler.Scheduler(lowered.operations).nodes)}
                )
        print(json.dumps(found[-1]), flush=True)
        return make_boxed_func(graph.forward)

    return compiler


def _count(nodes) -> dict[str, float]:
    kinds, moved = collections.Counter(), 0
    for node in nodes:
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            kinds["calls"] += 1
        elif not isinstance(node, scheduler.NopKernelSchedulerNode):
            kinds["reductions" if node.is_reduction() else "pointwise"] += 1
            moved += int(node.get_read_write_buffers_sizes())
    return {**kinds, "own": kinds["pointwise"] + kinds["reductions"], "MB": round(moved / 1e6, 1)}


def count(step, *inputs: torch.Tensor, options: dict | None = None) -> list[dict]:
    """Kernels of a function that gives one tensor, forward and backward."""
    found: list[dict] = []

    def partition(graph, inputs, **given):
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, **given, compiler="inductor")

    def backend(graph, inputs):
        forward, backward = (
            counted(direction, options or {}, found) for direction in ("forward", "backward")
        )
        return aot_module_simplified(
            graph,
            inputs,
            fw_compiler=forward,
            bw_compiler=backward,
            decompositions=select_decomp_table(),
            partition_fn=partition,
        )

    init_backend_registration()
    with mock.patch.object(blocks, "for_gpu", lambda x: True):
        output = torch.compile(step, backend=backend, dynamic=False)(*inputs)
        output.backward(torch.ones_like(output))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="original")
    parser.add_argument(
        "--inductor",
        type=json.loads,
        metavar="JSON",
        help="options of PyTorch's compiler in place of the package's; {}: none",
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    settings = resolve(options.recipe, **{"amp": "bf16", "device": "cpu", **dict(options.p)})
    model, loss = build_model(settings).to(memory_format=torch.channels_last), build_loss(settings)
    images = torch.zeros(settings.batch_size, 3, *model.canvas).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(settings.batch_size, *model.mask_canvas, dtype=torch.int64)

    def step(images, labels):
        with autocast(settings, torch.device("cpu")):
            output = model(images)
        return loss(output, labels)[0]

    chosen = (
        compiler_options(settings, torch.device("cuda")) if options.inductor is None else options.inductor
    )
    found = count(step, images, labels, options=chosen)
    print(
        json.dumps(
            {
                "own": sum(f["own"] for f in found),
                "calls": sum(f.get("calls", 0) for f in found),
                "MB": round(sum(f["MB"] for f in found), 1),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
